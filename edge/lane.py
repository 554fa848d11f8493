"""One optimization profile of a TensorRT engine: its context, the shapes that is set to, and its CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from edge.cuda import Cuda
from edge.errors import BackendError

log = logging.getLogger(__name__)


class Lane:
    """Runs of up to `size` pictures, the number that the profile is tuned for, in a context of their own.

    rows: inputs' name -> shape of one row. check: gives back what it gets, or raises BackendError with TensorRT's words
    where that is None or False. refusals: makes a BackendError of what TensorRT's bindings raise where others of their
    functions give False.
    """

    def __init__(
        self,
        context: Any,
        size: int,
        cuda: Cuda,
        rows: Mapping[str, tuple[int, ...]],
        check: Callable[[str, object], Any],
        refusals: Callable[[str], AbstractContextManager[None]],
        name: str,
    ) -> None:
        self.context, self.size = context, size
        self._cuda, self._rows, self._check, self._refusals, self._name = cuda, rows, check, refusals, name
        self._set = 0  # rows that the context's shapes are set to
        self._seen = 0  # runs since then
        self._graph: object | None = None
        self._may_record = True

    def choose(self, profile: int) -> None:
        """Raises BackendError."""
        with self._refusals(f"refuses profile {profile}"):
            self.context.set_optimization_profile_async(profile, self._cuda.stream)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Where inputs and outputs lie in the GPU's memory. Raises BackendError."""
        for name, address in addresses.items():
            self._check(f"refuses the memory of {name}", self.context.set_tensor_address(name, address))

    def shape(self, rows: int) -> None:
        """Set the inputs' shapes. Raises BackendError."""
        self._set, self._seen = 0, 0  # until all of them are set
        for name, row in self._rows.items():
            self._check(f"refuses {rows} rows", self.context.set_input_shape(name, (rows, *row)))
        with self._refusals(f"cannot infer the shapes of {rows} rows"):
            missing = self.context.infer_shapes()
        if missing:
            self._check(f"misses the shapes of {missing}", None)
        self._set = rows

    def enqueue(self, rows: int) -> None:
        """One run, as a CUDA graph from the second one in a row on that has the size the profile is tuned for.

        A graph holds for the context as it was: TensorRT forbids to replay one after another shape was set. So a lane
        that meets several sizes goes on without, since each recording costs more than a few runs win by it.
        Raises BackendError.
        """
        if self._set != rows:
            self._graph = None
            self.shape(rows)
        if self._seen and self._may_record and rows == self.size:
            self._may_record = False
            self._graph = self._recorded()
        if self._graph is None:
            self._execute()
        else:
            self._cuda.replay(self._graph)
        self._seen += 1

    def _execute(self) -> None:
        self._check("refuses to run", self.context.execute_async_v3(self._cuda.stream))

    def _recorded(self) -> object | None:
        reason = "CUDA does not record it"
        try:
            if (graph := self._cuda.record(self._execute)) is not None:
                return graph
        except BackendError as error:
            reason = str(error)
        log.warning("%s: batches of %d run without a CUDA graph: %s", self._name, self.size, reason)
        return None

    def close(self) -> None:
        """Let the context go; nothing else may be asked of the lane then."""
        self.context = self._graph = None
