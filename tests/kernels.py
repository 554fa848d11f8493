"""The kernels of edge/ on a machine without a GPU: compiled by a C++ compiler, their grid run as a loop."""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

PIXELS = Path(__file__).parent.parent / "edge/pixels.cu"
SHIM = Path(__file__).parent / "cuda_shim.h"
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(')


@cache
def compiled(source: str) -> ctypes.CDLL:
    """The kernels of a CUDA source: `run_NAME(gx, gy, gz, bx, by, bz, arguments)`, grid, block and addresses of values.

    Skips the test where there is no g++.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ compiles the kernels for this machine: apt-get install g++")
    launchers = "".join(f"LAUNCHED({name})\n" for name in KERNEL.findall(source))
    library = _folder() / f"kernels{abs(hash(source)):x}.so"
    done = subprocess.run(
        # products and sums stay apart, as in the _rn functions
        [compiler, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++", "-", "-o", library],
        input=f'#include "{SHIM}"\n{source}\n{launchers}',
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@cache
def _folder() -> Path:
    """For as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="kernels-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
