"""The error tree: every mistake a person can make or meet, said in one line.

    LookoutError
    ├── ConfigError    78  a file the operator wrote is wrong: file, key, value, what is allowed
    ├── ModelError     65  cfg, weights, checkpoint or graph is wrong: section or key, expected, got
    ├── BundleError    72  hash, dims, bank or golden mismatch, with the command that mends it
    ├── BackendError   69  the device or its runtime refused
    ├── CaptureError   66  the source is gone or unreadable
    ├── WireError      76  bytes that are no Event
    └── StoreError     74  the disk under a collector's store refused

The numbers are the exit codes of all three command lines (after BSD's sysexits.h).
"""

from __future__ import annotations

from typing import ClassVar


class LookoutError(Exception):
    """Says what is wrong, what was expected, what was found, and what mends it; `str()` is one line.

    Raise a subclass. `expected` and `got` are shown with `str`, so quote text where its borders matter.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None) -> None:
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        super().__init__(what)

    def __str__(self) -> str:
        facts = [
            f"{name} {value}" for name, value in (("expected", self.expected), ("got", self.got)) if value is not None
        ]
        line = self.what + (": " + ", ".join(facts) if facts else "") + (f"; {self.remedy}" if self.remedy else "")
        return " ".join(line.split())  # foreign texts may hold newlines; a person gets one line


class ConfigError(LookoutError):
    """A file or option the operator wrote is wrong."""

    exit_code = 78


class ModelError(LookoutError):
    """A cfg, weights file, checkpoint or graph is wrong."""

    exit_code = 65


class BundleError(LookoutError):
    """A bundle is damaged, incomplete, or made for something else."""

    exit_code = 72


class BackendError(LookoutError):
    """The device or its runtime refused."""

    exit_code = 69


class CaptureError(LookoutError):
    """A camera, video or image is gone or unreadable."""

    exit_code = 66


class WireError(LookoutError):
    """Bytes that are no Event."""

    exit_code = 76


class StoreError(LookoutError):
    """The disk under a collector's store refused."""

    exit_code = 74
