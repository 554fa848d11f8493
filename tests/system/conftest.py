"""A Debian root, and the package that goes into it, made once for all workers of a test run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from appliance.image import PAYLOAD
from tests.flow.conftest import ROOT, mini, video
from tests.system.roots import Root, alone, copied, debian, lacking

__all__ = ["mini", "video"]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def debian_root() -> Path:
    """For copying only; see roots.debian."""
    if reason := lacking():
        pytest.skip(reason)
    return debian()


@pytest.fixture
def box(debian_root: Path, tmp_path: Path) -> Iterator[Root]:
    """A Debian of the test's own."""
    with copied(debian_root, tmp_path / "box") as root:
        yield root


@pytest.fixture(scope="session")
def deb(shared: Path, debian_root: Path, mini: Path) -> Path:
    """lookout_VERSION_amd64.deb with the mini bundle, as `make image` builds it."""
    with alone(shared / "deb.lock"):
        built = sorted((shared / "deb").glob("*.deb"))
        if not built:
            words = ["-m", "appliance", "image", "--bundle", str(mini), "--arch", "amd64", "--out", str(shared / "deb")]
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built = sorted((shared / "deb").glob("*.deb"))
    (package,) = built
    return package


@cache
def release_of(deb: Path) -> str:
    """The release that a package makes; tar reads all of it for that."""
    archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with archive:
        words = ["tar", "--extract", "--to-stdout", f"./{PAYLOAD}/release"]
        text = subprocess.run(words, stdin=archive.stdout, capture_output=True, check=True).stdout
    return text.decode().strip()
