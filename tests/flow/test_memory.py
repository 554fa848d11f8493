"""What a box needs it takes at its start: a crowd before every camera at once, weeks later, finds it there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.flow.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from edge.backend import open_sessions
from edge.bundle import open_bundle
from edge.heap import steady
from edge.serve import tested

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

steady()
bundle = open_bundle(Path(sys.argv[1]))
facts = bundle.manifest
frames = lambda n, own: {"image": np.zeros((n, own.height, own.width, 3), np.uint8)}
crops = lambda n: {"image": np.zeros((n, facts.encoder.size, facts.encoder.size, 3), np.uint8)}
with open_sessions(bundle, "onnxruntime", threads=1) as sessions:
    tested(bundle, sessions)
    before = resident()
    for cameras, people in ((1, 1), (4, 3), (8, 40), (2, 32), (3, 7), (8, 60)):
        sessions.detector.run(frames(cameras, facts.detector))
        sessions.smaller.run(frames(cameras, facts.smaller))
        sessions.encoder.run(crops(people))
    print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_a_crowd_needs_no_more_memory_than_the_self_test(mini: Path) -> None:
    words = [sys.executable, "-c", PROGRAM, str(mini)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 24  # MiB; with all pictures in one run it is hundreds
