"""A real mini bundle, built once by the real command, and a real video made from the golden picture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "export/mini/pets-650.jpg"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*words: object, code: int | None = 0, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `edge …`, `collector …` or `export …` as a user would; the exit code must be `code` (None: any)."""
    module = {"edge": "edge.cli", "collector": "collector.cli", "export": "export"}[str(words[0])]
    done = subprocess.run(
        [sys.executable, *starter(module), *map(str, words[1:])],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if code is not None:
        assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    if done.returncode:
        assert "Traceback" not in done.stderr
    return done


def starter(module: str) -> list[str]:
    """The arguments that start a command line in a process of its own, as its console script does."""
    return ["-m", "export"] if module == "export" else ["-c", f"from {module} import main; main()"]


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """engines/mini, for reading only."""
    engines = tmp_path_factory.mktemp("engines")
    command("export", "build", "configs/models-mini.toml", "--engines", engines)
    return engines / "mini"


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of the golden picture, panned: people in every one."""
    image = cv2.imread(str(PICTURE))
    path = tmp_path_factory.mktemp("video") / "pan.avi"
    height, width = image.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (width, height))
    for shift in range(20):
        writer.write(np.roll(image, 2 * shift, axis=1))
    writer.release()
    return path
