"""What every fuzz target needs: bytes as choices, seeds as files, and atheris where it is installed.

A target is a module with `target(data: bytes)`, which raises when something is wrong, and `seeds()`. Run it as

    python -m tests.fuzz.events -max_total_time=600

with the options of libFuzzer, and with the name of a file that it left (crash-…) to see that one again.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

CUT = b"\xf5CUT"  # between the frames of a message; 0xf5 is in no UTF-8 text

_Kind = TypeVar("_Kind")
Target = Callable[[bytes], None]


def runs() -> bool:
    """Whether a target is what this process runs; else it is a test that looks at one, and nothing is instrumented."""
    spec = sys.modules["__main__"].__spec__
    return spec is not None and spec.name.startswith("tests.fuzz.")


def instrumented() -> AbstractContextManager[Any]:
    """Around the imports of the code under test: the fuzzer sees which of its branches were taken."""
    if not runs():
        return nullcontext()
    import atheris

    return atheris.instrument_imports(include=["edge", "collector"])


def watched(function: Target) -> Target:
    """The same for one function of a test."""
    if not runs():
        return function
    import atheris

    return atheris.instrument_func(function)


class Choices:
    """Reads decisions from bytes, front to back; when there are no more, the first choice is taken each time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Whether there is anything left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """At most so many bytes."""
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        return self.take(max(len(self._data) - self._at, 0))

    def below(self, limit: int) -> int:
        """A number, 0 <= n < limit <= 256."""
        return int.from_bytes(self.take(1), "big") % limit

    def number(self) -> int:
        """Mostly small; else one of those at which something ends, or any of 64 bits."""
        match self.below(8):
            case 0:
                return self.pick((2**63 - 2, 2**63 - 1, 2**63, 2**64 - 1, 2**62, 2**31, 2**53 + 1, 10**30, -1))
            case 1:
                return int.from_bytes(self.take(8), "big")
        return self.below(16)

    def pick(self, options: Sequence[_Kind]) -> _Kind:
        return options[self.below(len(options))]

    def value(self) -> object:
        """Something to stand in a JSON field."""
        kinds: tuple[Callable[[], object], ...] = (
            self.number,
            lambda: self.pick((None, True, False, "", "x" * 600, "7", "\ud800", [], {}, [[]], {"": {}})),
            lambda: self.pick((0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"), 5e-324)),
            lambda: self.take(self.below(12)).decode("utf-8", "replace"),
        )
        return self.pick(kinds)()

    def changed(self, content: object) -> object:
        """A JSON value with one place of it replaced, left out, doubled, or given a name of its own."""
        if isinstance(content, dict) and content and self.below(8):
            key = self.pick(sorted(content))
            match self.below(8):
                case 0:
                    return {name: value for name, value in content.items() if name != key}
                case 1:
                    return {**content, self.pick(("x", "schema", "\x1b[2J", "y" * 5000)): self.value()}
            return {**content, key: self.changed(content[key])}
        if isinstance(content, (list, tuple)) and content and self.below(4):
            at = self.below(len(content))
            match self.below(8):
                case 0:
                    return [*content[:at], *content[at + 1 :]]
                case 1:
                    return [*content, content[at]]
            return [*content[:at], self.changed(content[at]), *content[at + 1 :]]
        return self.value()


def assert_fits(error: Exception) -> None:
    """What is wrong with a message becomes the reason of a REFUSED, whatever was in the message."""
    assert len(str(error)) < 500, "too long for a reason"


def json_of(value: object) -> bytes:
    return json.dumps(value).encode()


def frames_of(data: bytes) -> list[bytes]:
    """A message from bytes; `joined` is its inverse."""
    return data.split(CUT)


def joined(frames: Iterable[bytes]) -> bytes:
    return CUT.join(frames)


def fuzz(target: Target, seeds: Sequence[bytes]) -> None:
    """Run libFuzzer over `target`; it takes its options from the command line, and ends the process."""
    import atheris

    logging.disable()  # a hundred thousand lost connections are no news here
    arguments = list(sys.argv)
    if all(argument.startswith("-") for argument in arguments[1:]):  # no file and no corpus was named
        corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        arguments.append(str(corpus))
    atheris.Setup(arguments, target)
    atheris.Fuzz()
