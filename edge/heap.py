"""The C library's heap, told to give back what it need not keep: for programs that run for months."""

from __future__ import annotations

import ctypes

# glibc's malloc.h. By default it keeps a heap for each of up to eight threads per core, and learns to cut ever larger
# pieces, pictures too, out of them: with every reconnect of a camera one of these heaps is a little more in pieces.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
ARENAS = 2
PICTURE = 1 << 20  # bytes from which on a piece is the system's own, and goes back to it


def steady() -> None:
    """Keep few heaps, and no pictures in them; before threads are started. Does nothing with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, ARENAS)
    mallopt(M_MMAP_THRESHOLD, PICTURE)
