"""SQLite's write-ahead log (https://sqlite.org/fileformat2.html#the_write_ahead_log), read beyond what is wrong in it.

A header, then frames: each a page and what it is, with a checksum that goes on from the frame before.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from edge.records import PAGE

_MAGIC, _VERSION = 0x377F0682, 3007000
_HEADER = struct.Struct(">4I8s")  # magic, of which a bit tells the order of bytes; version, page size, counter, salts
_FRAME = struct.Struct(">2I8s8s")  # page number; pages of the file if a commit ends here, else 0; salts, checksum
_SUM = struct.Struct(">2I")
_FIRST = _HEADER.size + _SUM.size  # where the first frame begins

_Sum = tuple[int, ...]  # two numbers of 32 bits


class Log(NamedTuple):
    """What a log says is in the file."""

    pages: dict[int, bytes]  # page number, from 1 -> its newest content that was committed
    size: int  # pages of the file; 0: it does not say
    damaged: bool  # SQLite would not see all of it


def read_log(content: bytes) -> Log:
    """All that is in a log.

    After a power cut its end may be anything: the first frame that does not match its checksum ends it. But where
    frames behind that one go on from each other up to a commit, all were whole, and something was changed since.
    """
    header = content[:_FIRST].ljust(_FIRST, b"\0")
    magic, version, page, _, salts = _HEADER.unpack_from(header)
    stored = _SUM.unpack_from(header, _HEADER.size)
    little = not magic & 1
    whole = (magic | 1, version, page) == (_MAGIC | 1, _VERSION, PAGE)
    if not whole or _sum((0, 0), header[: _HEADER.size], little) != stored:
        whole, little, salts = False, sys.byteorder == "little", b""
    good: set[int] = set()  # where the frames are that go on from the one before
    seeds = {stored}  # of which one is right
    frames = range(_FIRST, len(content) - _FRAME.size - PAGE + 1, _FRAME.size + PAGE)
    for at in frames:
        _, _, its_salts, its_sum = _FRAME.unpack_from(content, at)
        stored, sums = _SUM.unpack(its_sum), set()
        known = salts or content[at - PAGE - 16 : at - PAGE - 8]  # or those of the frame before
        if its_salts == known and any(known):  # zeros go on from zeros
            page_of = content[at + _FRAME.size : at + _FRAME.size + PAGE]
            sums = {_sum(_sum(seed, content[at : at + 8], little), page_of, little) for seed in seeds}
            if stored in sums:
                good.add(at)
                salts, sums = its_salts, set()
        seeds = {stored, *(sums if len(seeds) == 1 else ())}
    commits = [at for at in frames if at in good and _FRAME.unpack_from(content, at)[1]]
    if not commits:
        return Log({}, 0, False)
    pages: dict[int, bytes] = {}
    damaged = not whole
    for at in frames:
        number, size, its_salts, _ = _FRAME.unpack_from(content, at)
        if at in good or its_salts == salts:
            pages[number] = content[at + _FRAME.size : at + _FRAME.size + PAGE]
        damaged = damaged or at not in good
        if at == commits[-1]:
            break
    return Log(pages, size, damaged)


def _sum(seed: _Sum, data: bytes, little: bool) -> _Sum:
    """SQLite's checksum, over 8 bytes at a time."""
    first, second = seed
    for one, two in struct.iter_unpack("<2I" if little else ">2I", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
