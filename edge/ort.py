"""ONNX Runtime on the CPU: the embedded default where there is no NVIDIA GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backend import Feed, TensorSpec
from edge.bundle import Precision
from edge.errors import BackendError

# It is read when the library loads. Without it, every version since 1.29 sends what it runs to its maker, and keeps an
# id of the machine and a database in the home folder (https://github.com/microsoft/onnxruntime/pull/27379); its own
# disable_telemetry_events() comes too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

_DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
}


class OrtSession:
    """A graph on ONNX Runtime's CPU provider.

    threads: per run; 0 takes every core. shared: intermediate results lie in memory that all such sessions use in turn,
    and that the process keeps when they are closed; else in memory of the session's own. rows: of one run of the graph,
    at most; more are run one part after the other, in the memory of one. None: all at once.
    """

    precision: Precision = "fp32"  # of a bundle's graphs for it
    about = f"ONNX Runtime {ort.__version__} on the CPU"

    def __init__(self, graph: Path | bytes, *, threads: int = 0, shared: bool = False, rows: int | None = None) -> None:
        self._rows = rows
        self._name = str(graph) if isinstance(graph, Path) else "graph in memory"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # A thread that spins for its next piece of work takes the core from capture and from the other session: on two
        # busy cores a frame took 1.4 times as long, on idle ones the same.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if shared:
            _share_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.log_severity_level = 3  # errors only: they come back as exceptions
        try:
            self._session: Any = ort.InferenceSession(
                str(graph) if isinstance(graph, Path) else graph, options, providers=["CPUExecutionProvider"]
            )
            self.inputs = {node.name: _spec(node) for node in self._session.get_inputs()}
            self.outputs = {node.name: _spec(node) for node in self._session.get_outputs()}
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise BackendError(f"{self._name}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        """All outputs for these inputs. Raises BackendError."""
        if self._session is None:
            raise BackendError(f"{self._name}: the session is closed")
        try:
            parts = [self._session.run(None, part) for part in self._parts(feeds)]
        except Exception as error:
            raise BackendError(f"{self._name}: ONNX Runtime {ort.__version__}: {error}") from error
        whole = parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return dict(zip(self.outputs, whole, strict=True))

    def _parts(self, feeds: Mapping[str, Feed]) -> Iterator[dict[str, Feed]]:
        """The feeds of each run of the graph."""
        rows = self._rows
        if rows is None or len(counts := {len(feed) for feed in feeds.values()}) != 1:
            yield dict(feeds)  # where the counts differ, too: ONNX Runtime says what is wrong with that
            return
        for start in range(0, max(counts.pop(), 1), rows):
            yield {name: feed[start : start + rows] for name, feed in feeds.items()}

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@functools.cache
def _share_memory() -> None:
    """Once in a process: ONNX Runtime refuses a second arena of the same kind."""
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, None)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(np.dtype(_DTYPES[node.type]), shape)
