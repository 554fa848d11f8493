"""What the tests of a real GPU need, and in one sentence each why they are skipped where it is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge.cuda
import edge.cuda_bindings
import edge.cuda_pycuda
from edge import trt
from edge.backend import OnDevice
from edge.bundle import Bundle
from edge.cuda import INSTALL, Cuda
from edge.errors import BackendError
from edge.values import Image
from export.build import build
from export.recipe import read_recipe

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BINDINGS: dict[str, Callable[[], Any]] = {
    "cuda.bindings": lambda: edge.cuda_bindings.BindingsCuda,
    "pycuda": lambda: edge.cuda_pycuda.PycudaCuda,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing in this folder runs without a GPU.

    What drivers' own Python packages deprecate is shown and no error: their versions are the machine's.
    """
    mine = [item for item in items if HERE in item.path.parents]
    here = bool(mine) and edge.cuda.gpu_count() > 0
    for item in mine:
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not here:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here that a CUDA driver offers"))


@pytest.fixture(params=BINDINGS)
def binding(request: pytest.FixtureRequest) -> Callable[[], Cuda]:
    """Each of the two, where it is installed: calling it opens the GPU."""
    made: Any = BINDINGS[request.param]()
    if not made.installed():
        pytest.skip(f"{request.param} is not installed: {INSTALL}")
    return made  # type: ignore[no-any-return]


@pytest.fixture
def cuda(binding: Callable[[], Cuda]) -> Iterator[Cuda]:
    """The GPU by each binding."""
    with closing(binding()) as opened:
        yield opened


@pytest.fixture(scope="session")
def tensorrt() -> Any:
    """The module."""
    try:
        module = trt.load()
    except BackendError as error:
        pytest.skip(str(error))
    if not any(made().installed() for made in BINDINGS.values()):
        pytest.skip(f"no Python binding for CUDA here: {INSTALL}")
    return module


@pytest.fixture
def chosen(tensorrt: Any) -> Iterator[Cuda]:
    """The GPU by the binding that a box would take, where there is TensorRT."""
    with closing(edge.cuda.open_cuda()) as opened:
        yield opened


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The mini bundle without engines, for reading only."""
    folder = tmp_path_factory.mktemp("engines") / "mini"
    return build(read_recipe(ROOT / "configs/models-mini.toml"), folder, lambda step, said: None)


def downloaded(cuda: Cuda, pictures: OnDevice) -> Image:
    """Pictures in the GPU's memory as an array."""
    array = np.zeros(pictures.shape, np.uint8)
    if len(pictures):
        cuda.download(array, pictures.address)
    cuda.synchronize()
    return array


def free_now(cuda: Cuda) -> int:
    """Bytes of the GPU's memory that are free when all work is done."""
    cuda.synchronize()
    return cuda.free_memory()
