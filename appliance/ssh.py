"""One box over the system's ssh: one connection that questions, copies and commands share; no password is asked for."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType

from edge.errors import BackendError, ConfigError

Say = Callable[[str], None]

LOST = 255  # ssh's exit code where the connection failed; no program of a box ends with it
CONNECT_S, QUESTION_S = 20, 120
_CHUNK = 1 << 18  # bytes
_TOLD_S = 5.0  # between two words on a copy's progress, at most
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "6",
    "ControlPersist": "no",
    "LogLevel": "ERROR",
}


class Ssh:
    """A connection to `destination`: user@host, ssh://user@host:port, a name of ~/.ssh/config; a context manager.

    Raises ConfigError for what is no destination, BackendError where the box cannot be reached.
    """

    def __init__(self, destination: str) -> None:
        if destination.startswith("-") or not destination.strip():
            raise ConfigError(f"{destination!r} is no ssh destination", expected="like user@host")
        self.destination = destination

    def __enter__(self) -> Ssh:
        self._folder = TemporaryDirectory(prefix="lookout-")  # a socket's whole path has to be short
        self._socket = Path(self._folder.name, "box")
        options = {**_OPTIONS, "ControlPath": self._socket}
        self._words = ["ssh", "-T", *(word for name in options for word in ("-o", f"{name}={options[name]}"))]
        self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._master = subprocess.Popen(
            [*self._words, "-M", "-N", "--", self.destination],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and what still goes over it."""
        self._master.terminate()
        self._master.wait()
        self._errors.close()
        self._folder.cleanup()

    def ask(self, script: str, *, seconds: float | None = QUESTION_S) -> str:
        """What a shell script says; None waits for ever. Raises BackendError where it fails."""
        try:
            done = subprocess.run(
                self._command(script),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{self.destination} does not answer", expected=f"within {seconds:.0f} s") from error
        if done.returncode:
            raise BackendError(f"{self.destination}: {_last(done.stderr) or f'exit code {done.returncode}'}")
        return done.stdout

    def stream(self, script: str, say: Say) -> int:
        """Run a shell script, its lines passed on -> its exit code; LOST where the connection went."""
        with subprocess.Popen(
            self._command(script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as program:
            assert program.stdout is not None
            for line in program.stdout:
                say(f"  {line.rstrip()}")
        return program.returncode

    def copy(self, file: Path, target: str, say: Say) -> None:
        """Put a file there. Raises BackendError with the box's own words, as of a full disk."""
        size, sent, told, at = file.stat().st_size, 0, 0, time.monotonic()
        command = self._command(f"cat > {shlex.quote(target)}")
        with (
            file.open("rb") as source,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as program,
        ):
            assert program.stdin is not None
            assert program.stderr is not None
            try:
                while chunk := source.read(_CHUNK):
                    program.stdin.write(chunk)
                    sent += len(chunk)
                    if (share := 10 * sent // size) > told or time.monotonic() - at > _TOLD_S:
                        told, at = share, time.monotonic()
                        say(f"  copied {sent / 1e6:.0f} of {size / 1e6:.0f} MB, {100 * sent // size} %")
            except BrokenPipeError:
                pass  # why, it says itself
            with suppress(BrokenPipeError):
                program.stdin.close()
            said = program.stderr.read().decode(errors="replace")
        if program.returncode:
            raise BackendError(f"{self.destination}: {target} was not written", got=_last(said) or "no more words")

    def _command(self, script: str) -> Sequence[str]:
        return [*self._words, "--", self.destination, f"sh -c {shlex.quote(script)}"]

    def _wait(self) -> None:
        """Until the connection stands."""
        until = time.monotonic() + CONNECT_S
        while not self._socket.exists():
            try:
                self._master.wait(0.05)
            except subprocess.TimeoutExpired:
                if time.monotonic() < until:
                    continue
            self._errors.seek(0)
            why = _last(self._errors.read()) or f"no connection within {CONNECT_S} s"
            raise BackendError(f"{self.destination} cannot be reached", got=why, remedy=f"try ssh {self.destination}")


def _last(said: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
