"""Long work, watched: what it is at, for how long, and with how much memory; a silent build looks like a crash."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape

LIVE, LOGGED = 0.5, 10.0  # s between two looks, on a terminal and elsewhere


class Watch:
    """A line that follows the work: on a terminal one that changes, elsewhere a new one every ten seconds.

    Called with (stage, done, total) by whatever works, from any thread; total 0: nobody knows.
    """

    def __init__(self, console: Console, stage: str) -> None:
        self._console, self._stage, self._done = console, stage, ""
        self._began, self._over = time.monotonic(), threading.Event()
        self._stack = ExitStack()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._stage, self._done = stage, f" {done}/{total}" if total else ""

    def line(self) -> str:
        """What is to be told now."""
        seconds = time.monotonic() - self._began
        return f"{self._stage}{self._done}, {seconds:.0f} s{_memory()}"

    def __enter__(self) -> Watch:
        live = self._console.is_terminal
        status = self._stack.enter_context(self._console.status(escape(self.line()))) if live else None

        def look() -> None:
            while not self._over.wait(LIVE if live else LOGGED):
                if status is not None:
                    status.update(escape(self.line()))
                else:
                    self._console.print(f"{'':>9}  {escape(self.line())}", soft_wrap=True)

        ticker = threading.Thread(target=look, name="watch", daemon=True)
        self._stack.callback(ticker.join)
        self._stack.callback(self._over.set)  # the stack runs backwards
        ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()


def _memory() -> str:
    """Of this process and left to all, where the system tells."""
    try:
        used = _kib("/proc/self/status", "VmRSS:")
        free = _kib("/proc/meminfo", "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        return ""
    return f", {used / 2**20:.1f} GiB used, {free / 2**20:.1f} GiB free"


def _kib(path: str, key: str) -> int:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
