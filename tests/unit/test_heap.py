"""A heap of few arenas that gives pictures back: measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Threads that each hold a large and a small piece alive in turn, as readers of cameras do, and then are gone.
PROGRAM = """
import ctypes, sys, threading
from edge.heap import steady
if "steady" in sys.argv:
    steady()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
kept = []
def reader():
    for size in (4 << 20, 6 << 20) * 8:
        picture = libc.malloc(size)
        ctypes.memset(picture, 1, size)
        kept.append(libc.malloc(4096))
        libc.free(picture)
for _ in range(4):
    threads = [threading.Thread(target=reader) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024)
"""


def resident(*words: str) -> int:
    """MiB after the readers have gone."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is what is told")
def test_what_readers_leave_behind_is_given_back() -> None:
    assert resident("steady") + 10 < resident()
