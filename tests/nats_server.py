"""A real nats-server with JetStream, out of Debian's package where the machine has none; killed as hard as wanted."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType

import pytest

from edge.errors import CaptureError
from export.debian import file_from_package
from export.weights import cache_folder

DEADLINE = 30.0  # s


@cache  # without a network it is asked for once
def executable() -> Path | str:
    """The program, or why it cannot be had."""
    if found := shutil.which("nats-server"):
        return Path(found)
    kept = cache_folder() / "nats-server"
    if not kept.is_file():
        try:
            with file_from_package(
                "nats-server", "usr/sbin/nats-server", folder=kept.parent, what="nats-server", size="4 MB"
            ) as fetched:
                fetched.chmod(0o755)
                fetched.replace(kept)
        except (CaptureError, OSError, tarfile.TarError) as error:
            return f"no nats-server: {error}"
    return kept


def nats_server() -> Path:
    """The program; the test that asks is skipped where it cannot be had."""
    found = executable()
    if isinstance(found, str):
        pytest.skip(found)
    return found


class NatsServer:
    """nats-server on a free port that it keeps over restarts, its streams in `folder`; a context manager.

    settings: lines of its configuration, such as "max_payload: 4096".
    """

    def __init__(self, folder: Path, *settings: str, program: Path | None = None) -> None:
        self.folder, self.settings = folder, settings
        self.port = -1  # it chooses
        self._program = program or nats_server()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Returns when it takes connections."""
        config = self.folder / "nats.conf"
        lines = [f"listen: 127.0.0.1:{self.port}", f'jetstream: {{store_dir: "{self.folder}"}}', *self.settings]
        config.write_text("\n".join(lines))
        words = [str(self._program), "-c", str(config), "--ports_file_dir", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        ports = self.folder / f"{self._program.name}_{self._process.pid}.ports"
        end = time.monotonic() + DEADLINE
        while not (ports.exists() and (text := ports.read_text())):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.01)
        self.port = int(json.loads(text)["nats"][0].rpartition(":")[2])

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As by kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        """On the same port and with the same streams."""
        self.kill()
        self.start()

    def __enter__(self) -> NatsServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
