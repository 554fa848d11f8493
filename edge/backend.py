"""The seam between the project and whatever runs a graph: a Session, and the one place that chooses it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.values import Backend


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of one input or output; None is a free axis."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Session(AbstractContextManager["Session"], Protocol):
    """A loaded graph. `run` may be called from one thread at a time; outputs belong to the caller."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs for these inputs. Raises BackendError."""
        ...

    def close(self) -> None: ...


def open_session(graph: Path | bytes, backend: Backend = "onnxruntime", *, threads: int = 0) -> Session:
    """Load an ONNX file, or the bytes of one, on this backend.

    threads: CPU threads for one run; 0 takes every core. Raises BackendError.
    """
    match backend:
        case "onnxruntime":
            from edge.ort import OrtSession

            return OrtSession(graph, threads=threads)
