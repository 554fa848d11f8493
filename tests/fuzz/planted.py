"""Fuzz target with a fault on purpose, behind checks that chance does not pass: proof that the fuzzer sees branches."""

from __future__ import annotations

from tests.fuzz.fuzzing import fuzz, watched


class PlantedError(Exception):
    """What must be found."""


@watched
def target(data: bytes) -> None:
    """Reads "PLANT", letter by letter: one in 2**40 of random beginnings."""
    if data[:1] == b"P" and data[1:2] == b"L" and data[2:3] == b"A" and data[3:4] == b"N" and data[4:5] == b"T":
        raise PlantedError


def seeds() -> list[bytes]:
    return [b"p"]


if __name__ == "__main__":
    fuzz(target, seeds())
