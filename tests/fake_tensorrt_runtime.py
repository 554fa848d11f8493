"""The runtime's half of the fake TensorRT: a plan's graph runs on ONNX Runtime, on the memory behind the addresses."""

from __future__ import annotations

import ctypes
import hashlib
import json
import weakref
from typing import Any

import numpy as np
import onnxruntime

from tests.fake_cuda import FakeCuda, on_stream
from tests.fake_tensorrt import NUMPY, Gated
from tests.fake_tensorrt_builder import MAGIC


class Runtime(Gated):
    def __new__(cls, logger: Any) -> Any:
        if cls._home._watch.refuse == "Runtime":
            cls._home._log("ERROR", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return super().__new__(cls)

    def __init__(self, logger: Any) -> None:
        self._home._register(self, logger)
        self._engines: weakref.WeakSet[ICudaEngine] = weakref.WeakSet()
        self._home._watch.events.append("+runtime")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """None, with an error in the log, for what this version on this GPU did not build."""
        plan = bytes(serialized_engine)
        start = len(MAGIC) + 4
        try:
            if not plan.startswith(MAGIC):
                raise ValueError("Serialization assertion stdMagicTag == magicTag failed. Magic tag does not match")
            stop = start + int.from_bytes(plan[len(MAGIC) : start], "little")
            header, graph = json.loads(plan[start:stop]), plan[stop:]
            if header["version"] != self._home.__version__:
                raise ValueError(
                    f"The engine plan file is not compatible with this version of TensorRT: {header['version']}"
                )
            if header["capability"] != self._home._watch.capability:
                raise ValueError("The engine plan file is generated on an incompatible device")
            if hashlib.sha256(graph).hexdigest() != header["sha256"]:
                raise ValueError("Serialization assertion safeVersionRead failed: checksum of the plan")
        except ValueError as error:
            self._home._log("ERROR", f"IRuntime::deserializeCudaEngine: Error Code 1: {error}")
            return None
        engine = self._home._classes.ICudaEngine(self, header, graph)
        self._engines.add(engine)
        return engine

    def __del__(self) -> None:
        watch = self._home._watch
        watch.events.append("-runtime")
        if len(self._engines):
            watch.mistakes.append("the runtime went before its engine")


class ICudaEngine(Gated):
    def __init__(self, runtime: Runtime, header: dict[str, Any], graph: bytes) -> None:
        self._runtime, self._header = weakref.ref(runtime), header
        self._contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self._made = 0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            runtime._home._watch.compute(graph), options, providers=["CPUExecutionProvider"]
        )
        self._tensors = {name: (kind, tuple(shape)) for name, kind, shape in header["inputs"] + header["outputs"]}
        self._inputs = [name for name, _, _ in header["inputs"]]
        self._home._watch.events.append("+engine")

    def __del__(self) -> None:
        watch = self._home._watch
        watch.events.append("-engine")
        if len(self._contexts):
            watch.mistakes.append("the engine went before its contexts")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return int(self._header["layers"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def device_memory_size(self) -> int:
        return 1 << 20

    @property
    def device_memory_size_v2(self) -> int:
        return 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._home._classes.TensorIOMode
        return modes.NONE if name not in self._tensors else modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._home._classes.DataType[self._tensors[name][0]]

    def get_tensor_location(self, name: str) -> Any:
        places = self._home._classes.TensorLocation
        return places.HOST if name in self._home._watch.on_host else places.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._header["profiles"][profile_index][name]]

    def create_execution_context(self) -> Any:
        """None where there is no memory for its activations."""
        number, self._made = self._made, self._made + 1
        if number == self._home._watch.refuse_context:
            self._home._log("ERROR", "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)")
            return None
        context = self._home._classes.IExecutionContext(self, number)
        self._contexts.add(context)
        return context


class IExecutionContext(Gated):
    """The first of an engine has profile 0; others must choose one, which no other context may hold."""

    def __init__(self, engine: ICudaEngine, number: int) -> None:
        self._of, self._number = weakref.ref(engine), number
        self._profile = -1 if any(context._profile == 0 for context in engine._contexts) else 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._state = 0  # counts changes: a CUDA graph holds for one
        self._home._watch.events.append(f"+context {number}")

    def __del__(self) -> None:
        self._home._watch.events.append(f"-context {self._number}")

    def _alive(self) -> ICudaEngine:
        engine = self._of()
        assert engine is not None, "a context is used after its engine went"
        assert engine._runtime() is not None, "a context is used after its runtime went"
        return engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """True; NVIDIA's bindings raise what the C++ function answers with false."""
        engine = self._alive()
        taken = {context._profile for context in engine._contexts if context is not self}
        refused = self._refuses("set_optimization_profile_async")
        if not refused and (profile_index in taken or not 0 <= profile_index < len(engine._header["profiles"])):
            self._home._log("ERROR", f"setOptimizationProfileAsync: profile {profile_index} is out of range or in use")
            refused = True
        if refused:
            del self, engine  # a frame of C++ holds nothing for a traceback to keep
            raise RuntimeError("Error in set optimization profile async.")
        self._profile, self._shapes, self._state = profile_index, {}, self._state + 1
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        engine, shape = self._alive(), tuple(shape)
        if self._refuses("set_input_shape"):
            return False
        if name in engine._inputs and self._profile >= 0:
            low, _, high = engine._header["profiles"][self._profile][name]
            if len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                self._shapes[name], self._state = shape, self._state + 1
                return True
        self._home._log(
            "ERROR", f"IExecutionContext::setInputShape: Static dimension or profile mismatch: {name} {shape}"
        )
        return False

    def _refuses(self, method: str) -> bool:
        if refused := self._home._watch.refuse == method:
            self._home._log("ERROR", f"IExecutionContext::{method}: refused")
        return refused

    def infer_shapes(self) -> list[str]:
        """The inputs whose shapes are missing; raises where the shapes do not fit each other."""
        if self._refuses("infer_shapes"):
            del self
            raise RuntimeError("infer_shapes error code: -1")
        return [name for name in self._alive()._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 for what follows from shapes not yet set."""
        engine = self._alive()
        if name in self._home._watch.answer_shape:
            return self._home._watch.answer_shape[name]
        shape = engine._tensors[name][1]
        if name in engine._inputs:
            return self._shapes.get(name, shape)
        # the first free axis is the batch
        rows = next((shape[0] for shape in self._shapes.values()), -1) if not self.infer_shapes() else -1
        return tuple(rows if size == -1 and axis == 0 else size for axis, size in enumerate(shape))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._refuses("set_tensor_address"):
            return False
        if name not in self._alive()._tensors:
            self._home._log("ERROR", f"IExecutionContext::setTensorAddress: no tensor {name}")
            return False
        self._addresses[name], self._state = int(memory), self._state + 1
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Ask the stream's FakeCuda to read the inputs, run the graph, and write the outputs."""
        engine, watch, cuda = self._alive(), self._home._watch, on_stream(stream_handle)
        watch.runs.append((self._profile, dict(self._shapes), dict(self._addresses)))
        missing = [name for name in engine._tensors if not self._addresses.get(name)] + self.infer_shapes()
        if watch.refuse_enqueue:
            watch.refuse_enqueue -= 1
            missing.append("Cuda Runtime (an illegal memory access was encountered)")
        if missing:
            self._home._log("ERROR", f"IExecutionContext::enqueueV3: Error Code 3: {missing[-1]}: no address or shape")
            return False
        state = self._state

        def action() -> None:
            if self._state != state:
                watch.mistakes.append("a CUDA graph is replayed after its context was changed")
            self._execute(cuda)

        cuda.enqueue(action)
        return True

    def _execute(self, cuda: FakeCuda) -> None:
        engine, feeds = self._alive(), {}
        for name in engine._inputs:
            dtype, shape = np.dtype(NUMPY[engine._tensors[name][0]]), self._shapes[name]
            size = dtype.itemsize * int(np.prod(shape))
            cuda._inside(self._addresses[name], size)
            feeds[name] = np.frombuffer(ctypes.string_at(self._addresses[name], size), dtype).reshape(shape)
        names = [name for name in engine._tensors if name not in engine._inputs]
        for name, answer in zip(names, engine._session.run(names, feeds), strict=True):
            cuda._inside(self._addresses[name], answer.nbytes)
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(answer).ctypes.data, answer.nbytes)
