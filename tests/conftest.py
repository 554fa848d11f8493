"""What several test files share: hypothesis without a clock, a bundle on disk, a deadline that says who was late."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import settings

from tests.fakes import write_bundle

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # also where a test loads ONNX Runtime without edge/ort.py
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job has it, and so what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("lookout", deadline=None)  # on a busy machine a slow example is no mistake
settings.load_profile("lookout")

Deadline = Callable[[str, float], AbstractContextManager[None]]


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A bundle whose hashes are right and whose files hold nothing of use."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    """`with deadline("sending", 5):` fails instead of hanging."""

    @contextmanager
    def within(what: str, seconds: float) -> Iterator[None]:
        def late(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"{what} took more than {seconds} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return within
