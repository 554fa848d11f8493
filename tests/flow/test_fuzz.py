"""Hostile bytes, chosen by a fuzzer that watches which branches they take; LOOKOUT_FUZZ_SECONDS=600 looks longer."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("LOOKOUT_FUZZ_SECONDS", "8"))  # for each target
SEED = os.environ.get("LOOKOUT_FUZZ_SEED", "1")
FOUND = 77  # libFuzzer's exit code for an exception
TARGETS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.py") if path.stem not in ("fuzzing", "planted"))

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has no wheel for this machine"
)


def fuzz(target: str, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a target, which leaves what it finds in `folder`."""
    words = (*words, "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/")
    # By way of a shell: Linux hands down the memory that the starting process once had, and libFuzzer counts it.
    return subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", f"tests.fuzz.{target}", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS + 120,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The traceback and where its bytes are, or the last it said."""
    at = done.stdout.find("=== Uncaught")
    return done.stdout[at if at >= 0 else -3000 :][:5000]


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_find_nothing(target: str) -> None:
    module = importlib.import_module(f"tests.fuzz.{target}")
    seeds = module.seeds()
    assert len(seeds) > 5
    for seed in [b"", *seeds]:
        module.target(seed)


@needs_atheris
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_nothing(target: str, tmp_path: Path) -> None:
    print(f"seed {SEED}, {SECONDS} s")
    runs = 600 if target == "spool" and SECONDS < 60 else -1  # it writes files: how many runs is the disk's affair
    done = fuzz(target, tmp_path, f"-seed={SEED}", f"-max_total_time={SECONDS}", f"-runs={runs}")
    assert done.returncode == 0, told(done)
    (made,) = re.findall(r"Done (\d+) runs", done.stdout)
    assert int(made) > 50, told(done)
    first, *_, last = re.findall(r"cov: (\d+)", done.stdout)
    assert int(last) > 20, "it sees no branches"
    print(f"{made} runs, {first} branches in the seeds, {last} at the end")


@needs_atheris
def test_the_fuzzer_finds_a_planted_fault(tmp_path: Path) -> None:
    done = fuzz("planted", tmp_path, f"-seed={SEED}", "-runs=5000000", "-max_total_time=60")
    assert done.returncode == FOUND, told(done)
    assert "PlantedError" in done.stdout
    (crash,) = tmp_path.glob("crash-*")
    assert crash.read_bytes().startswith(b"PLANT")
    again = fuzz("planted", tmp_path, crash)
    assert again.returncode == FOUND
    assert "PlantedError" in again.stdout
