"""TensorRT on an NVIDIA GPU: a built engine as a Session, by the names that every version from 8.6 has."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backend import Feed, OnDevice, TensorSpec
from edge.bundle import Platform, Precision
from edge.cuda import Cuda, Gpu
from edge.errors import BackendError, BundleError
from edge.lane import Lane

log = logging.getLogger(__name__)

REBUILD = "run `make export` on this machine"
INSTALL = (
    "on a Jetson `sudo apt install python3-libnvinfer`, in a virtual environment made with --system-site-packages; "
    "elsewhere `pip install tensorrt`"
)
# TensorRT's own map, trt.nptype, ends in AttributeError in versions that are older than the NumPy beside them
_DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "HALF": np.float16, "FLOAT": np.float32}


def load() -> Any:
    """The module `tensorrt`. Raises BackendError: how to get it."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: its shared libraries are missing
        raise BackendError(f"TensorRT cannot be imported: {error}", remedy=INSTALL) from error
    return tensorrt


def platform(trt: Any, gpu: Gpu) -> Platform:
    """What an engine that is built here runs on."""
    return Platform(tensorrt=str(trt.__version__), compute_capability=gpu.compute_capability, gpu=gpu.model)


def runs(total: int, batches: Sequence[int]) -> list[tuple[int, int, int]]:
    """(profile, start, stop) of each run: full ones of the largest built size, then the rest in the smallest that fits.

    Profile i takes batches[i - 1] + 1 to batches[i] pictures, the first one 1 to batches[0]; nothing is padded.
    """
    largest = batches[-1]
    full = [(len(batches) - 1, start, start + largest) for start in range(0, total - largest + 1, largest)]
    start = largest * len(full)
    rest = total - start
    return full + [(next(i for i, size in enumerate(batches) if rest <= size), start, total)] * (rest > 0)


@functools.cache
def logger_of(trt: Any) -> Any:
    """TensorRT's log as this module's; `quote()` gives the errors since it was last asked.

    One for the process: TensorRT hears the first logger alone, whatever a second builder or runtime brings.
    """
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}

    class TensorrtLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 refuses the object without it
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            log.log(level, "TensorRT: %s", msg)
            if level == logging.ERROR:
                self.errors.append(msg)

        def quote(self) -> str:
            told = " / ".join(self.errors)
            self.errors.clear()
            return told or "it gives no reason"

    return TensorrtLog()


class TrtSession:
    """An engine's plan on the GPU of `cuda`, a Session.

    batches: as the engine was built, ascending; profile i of the plan takes batches[i - 1] + 1 to batches[i]. Device
    and pinned memory is taken once, for the largest. trt: the module; None imports it.
    Raises BackendError: TensorRT refuses the plan, or memory is short; BundleError: the plan is not built as told.
    """

    def __init__(
        self,
        plan: bytes,
        cuda: Cuda,
        *,
        name: str,
        batches: Sequence[int],
        precision: Precision = "fp16",
        trt: Any = None,
    ) -> None:
        trt = load() if trt is None else trt
        self.precision = precision
        self.about = f"TensorRT {trt.__version__} on {cuda.gpu.name}, {precision}"
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self._name, self._cuda, self._batches, self._log = name, cuda, tuple(batches), logger_of(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._lanes: list[Lane] = []
        self._device: dict[str, int] = {}  # addresses
        self._host: dict[str, NDArray[np.uint8]] = {}  # pinned
        self._open = True
        try:
            self._log.errors.clear()
            # `cuda` stands for a device: without one, the Runtime of TensorRT 8.6 ends the process
            with self._refusals("has no runtime here"):
                self._runtime = trt.Runtime(self._log)
            self._engine = self._check("does not take the plan", self._runtime.deserialize_cuda_engine(plan), REBUILD)
            names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
            given = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
            self._check_built(given, names)
            self.inputs = {name: self._spec(name, self._engine.get_tensor_shape(name)) for name in given}
            self._open_lanes()
            # an output's other axes are known once the inputs' shapes are
            self._lanes[-1].shape(self._batches[-1])
            self.outputs = {name: self._output(name) for name in names if name not in given}
            self._take_memory()
        except BaseException:
            self.close()
            raise

    def _check(self, refusal: str, made: Any, remedy: str | None = None) -> Any:
        """`made`, unless TensorRT has given None or False for it. Raises BackendError with TensorRT's own words."""
        if made is None or made is False:
            raise BackendError(f"{self._name}: TensorRT {refusal}: {self._log.quote()}", remedy=remedy)
        return made

    @contextmanager
    def _refusals(self, refusal: str) -> Iterator[None]:
        """What pybind11 raises, as a BackendError: RuntimeError, or TypeError where a constructor gave nothing."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            raise BackendError(f"{self._name}: TensorRT {refusal}: {error}: {self._log.quote()}") from error

    def _check_built(self, inputs: Sequence[str], names: Sequence[str]) -> None:
        """That profiles and tensors are as the caller says and as a session can serve. Raises BundleError."""
        lows = (1, *(size + 1 for size in self._batches[:-1]))
        expected: object = list(zip(lows, self._batches, strict=True))
        profiles = range(self._engine.num_optimization_profiles)
        for name in inputs:
            shapes = [self._engine.get_tensor_profile_shape(name, profile) for profile in profiles]
            built = [(int(low[0]), int(high[0])) for low, _, high in shapes]
            if built != expected:
                raise self._misbuilt(f"input {name} was built for other batches", expected, built)
        expected = f"{', '.join(_DTYPES)} in DEVICE memory, one row per picture"
        for name in names:
            kind, place = self._engine.get_tensor_dtype(name).name, self._engine.get_tensor_location(name).name
            shape = tuple(self._engine.get_tensor_shape(name))
            if kind not in _DTYPES or place != "DEVICE" or not shape:
                raise self._misbuilt(f"tensor {name} is none for a session", expected, f"{kind}, {place}, {shape}")

    def _misbuilt(self, what: str, expected: object, got: object) -> BundleError:
        return BundleError(f"{self._name}: {what}", expected=expected, got=got, remedy=REBUILD)

    def _spec(self, name: str, shape: Sequence[int]) -> TensorSpec:
        row = (int(shape[axis]) for axis in range(1, len(shape)))
        return TensorSpec(np.dtype(_DTYPES[self._engine.get_tensor_dtype(name).name]), (None, *row))

    def _output(self, name: str) -> TensorSpec:
        shape = tuple(self._lanes[-1].context.get_tensor_shape(name))
        if shape[0] != self._batches[-1] or min(shape) < 0:
            expected = f"{self._batches[-1]} rows of a known shape"
            raise self._misbuilt(f"output {name} does not have one row per picture", expected, shape)
        return self._spec(name, shape)

    def _open_lanes(self) -> None:
        rows = {name: _row(spec) for name, spec in self.inputs.items()}
        for index, size in enumerate(self._batches):
            context = self._context(size)
            self._lanes.append(Lane(context, size, self._cuda, rows, self._check, self._refusals, self._name))
            del context  # only attributes keep what must go in order
            self._lanes[-1].choose(index)
        self._cuda.synchronize()

    def _context(self, size: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            # what it would have taken: a property whose name has changed between versions
            sized = hasattr(self._engine, "device_memory_size_v2")
            wanted = self._engine.device_memory_size_v2 if sized else self._engine.device_memory_size
            raise BackendError(
                f"{self._name}: no context for batches up to {size}: {self._log.quote()}",
                expected=f"up to {wanted / 2**20:.1f} MiB free",
                got=f"{self._cuda.free_memory() / 2**20:.1f} of {self._cuda.gpu.memory / 2**20:.1f} MiB",
                remedy="close what else uses the GPU, or build for smaller batches ([engine] of the recipe)",
            )
        return context

    def _take_memory(self) -> None:
        for name, spec in (self.inputs | self.outputs).items():
            size = max(1, self._batches[-1] * _row_bytes(spec))
            self._device[name] = self._cuda.allocate(size)
            self._host[name] = self._cuda.pin(size)
        for lane in self._lanes:
            lane.bind(self._device)

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        """All outputs for these inputs, any number of rows. Raises BackendError; the next run starts afresh."""
        if not self._open:
            raise BackendError(f"{self._name}: the session is closed")
        total = self._rows_of(feeds)
        answers = {name: np.empty((total, *_row(spec)), spec.dtype) for name, spec in self.outputs.items()}
        self._log.errors.clear()
        try:
            for profile, start, stop in runs(total, self._batches):
                self._run_lane(self._lanes[profile], feeds, answers, slice(start, stop))
        except BaseException:
            with suppress(BackendError):  # what is on its way still reads pinned memory, and the caller's
                self._cuda.synchronize()
            raise
        return answers

    def _run_lane(self, lane: Lane, feeds: Mapping[str, Feed], answers: dict[str, NDArray[Any]], rows: slice) -> None:
        count = rows.stop - rows.start
        for name, feed in feeds.items():
            self._put(name, feed[rows])
        lane.enqueue(count)
        pinned = {name: self._pinned(name, spec, count) for name, spec in self.outputs.items()}
        for name, array in pinned.items():
            self._cuda.download(array, self._device[name])
        self._cuda.synchronize()  # before the pinned memory is read, and written for the next run
        for name, array in pinned.items():
            answers[name][rows] = array

    def _rows_of(self, feeds: Mapping[str, Feed]) -> int:
        """How many rows all feeds have, after a check of each. Raises BackendError."""
        if set(feeds) != set(self.inputs):
            raise BackendError(f"{self._name}: inputs", expected=sorted(self.inputs), got=sorted(map(str, feeds)))
        counts = {}
        for name, spec in self.inputs.items():
            feed = feeds[name]
            dtype = np.dtype(np.uint8) if isinstance(feed, OnDevice) else getattr(feed, "dtype", type(feed).__name__)
            shape = tuple(getattr(feed, "shape", ()))
            if dtype != spec.dtype or len(shape) != len(spec.shape) or shape[1:] != spec.shape[1:]:
                wanted = f"{spec.dtype} {('n', *_row(spec))}"
                raise BackendError(f"{self._name}: input {name}", expected=wanted, got=f"{dtype} {shape}")
            counts[name] = shape[0]
        if len(set(counts.values())) != 1:
            raise BackendError(f"{self._name}: inputs", expected="as many rows in each", got=counts)
        return int(next(iter(counts.values())))

    def _put(self, name: str, feed: Feed) -> None:
        if isinstance(feed, OnDevice):
            self._cuda.copy(self._device[name], feed.address, len(feed) * _row_bytes(self.inputs[name]))
        else:
            pinned = self._pinned(name, self.inputs[name], len(feed))
            pinned[...] = feed
            self._cuda.upload(self._device[name], pinned)

    def _pinned(self, name: str, spec: TensorSpec, rows: int) -> NDArray[Any]:
        return self._host[name][: rows * _row_bytes(spec)].view(spec.dtype).reshape(rows, *_row(spec))

    def close(self) -> None:
        """Let go contexts, engine, runtime and memory, in this order; twice is once.

        Whatever refuses to be let go, the rest is; then a refusal is raised.
        """
        self._open = False
        # an exception on its way out holds the frames that it passed: so only attributes keep what must go in order
        while self._lanes:
            self._lanes.pop().close()
        self._engine = None
        self._runtime = None
        with ExitStack() as held:
            for address in self._device.values():
                held.callback(self._cuda.free, address)
            for array in self._host.values():
                held.callback(self._cuda.unpin, array)
            self._device, self._host = {}, {}

    def __enter__(self) -> TrtSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _row(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size or 0 for size in spec.shape[1:])


def _row_bytes(spec: TensorSpec) -> int:
    return spec.dtype.itemsize * int(np.prod(_row(spec), dtype=np.int64))
