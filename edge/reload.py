"""A configuration that is read again while the box runs: what may change does, or all stays as it was."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from edge.config import EdgeConfig, Settings, read_edge_config
from edge.errors import ConfigError, LookoutError

# What is made once, at the start: the box's name, the graphs, and what listens, connects or lies on a disk.
FIXED = ("device", "bundle", "publish", "spool", "runtime", "health")

log = logging.getLogger(__name__)


def fixed_changes(running: EdgeConfig, wanted: EdgeConfig) -> list[str]:
    """The keys that differ and want a restart, "publish.address" and the like."""
    return [key for name in FIXED for key in _differing(name, getattr(running, name), getattr(wanted, name))]


def _differing(name: str, one: object, other: object) -> Iterator[str]:
    if isinstance(one, Settings):
        yield from (f"{name}.{key}" for key in type(one).model_fields if getattr(one, key) != getattr(other, key))
    elif one != other:
        yield name


class Reloader:
    """Reads `path` again once `asked` is set, and has `take` put it into force.

    running: the configuration in force. take: of the new one and the one before; raises a LookoutError where it cannot
    be, and has then changed nothing. tell: what came of it, in one sentence, for events.
    """

    def __init__(
        self,
        path: Path,
        running: EdgeConfig,
        asked: threading.Event,
        take: Callable[[EdgeConfig, EdgeConfig], None],
        tell: Callable[[str], None],
    ) -> None:
        self._path, self.running, self._asked, self._take, self._tell = path, running, asked, take, tell

    def turn(self) -> bool:
        """Between two frames -> whether a new configuration is in force now. A bad one is told, and changes nothing."""
        if not self._asked.is_set():
            return False
        self._asked.clear()
        try:
            wanted = read_edge_config(self._path)
            if keys := fixed_changes(self.running, wanted):
                remedy = "restart the box for them (`systemctl restart lookout`), or put them back"
                raise ConfigError(f"{self._path}: cannot change while the box runs: {', '.join(keys)}", remedy=remedy)
            self._take(wanted, self.running)
        except LookoutError as error:
            log.error("%s; the configuration in force stays", error)
            self._tell(f"configuration refused, the one in force stays: {error}")
            return False
        self.running = wanted
        log.info("%s is in force: %d camera(s)", self._path, len(wanted.camera))
        self._tell("a new configuration is in force")
        return True
