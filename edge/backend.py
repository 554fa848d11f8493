"""The seam between the project and what runs a graph: a Session, an Imaging, and the one place that chooses them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.bank import Look
from edge.bundle import DETECTOR, IMAGE, SMALLER, Bundle, DetectorFacts, EncoderFacts, Network, Precision
from edge.values import Backend, Floats, Frame, Region

log = logging.getLogger(__name__)

# Pictures in one run on a box's CPU. ONNX Runtime keeps what the largest run ever took, and doubles what it has to get
# there: a box grew to 1.6 times its size when four cameras first showed a crowd at once. For that more in one run are
# 8 % faster where the network is small and has several threads, and no faster where it is YOLOv4.
ROWS: Mapping[Network, int] = {DETECTOR: 1, SMALLER: 1, IMAGE: 16}


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of one input or output; None is a free axis."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OnDevice:
    """Pictures, uint8 (n, H, W, 3) BGR, in the GPU's memory; valid until the Imaging that made them fits new frames."""

    address: int
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> OnDevice:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"OnDevice must be sliced in steps of 1, got {step}")
        _, height, width, channels = self.shape
        shape = (max(0, stop - start), height, width, channels)
        return OnDevice(self.address + start * height * width * channels, shape)


Pictures = NDArray[np.uint8] | OnDevice
Feed = NDArray[Any] | OnDevice


class Session(AbstractContextManager["Session"], Protocol):
    """A loaded graph. `run` may be called from one thread at a time; outputs belong to the caller.

    precision: how exact its answers are. about: what runs it, in words.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def about(self) -> str: ...

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        """All outputs for these inputs. Raises BackendError."""
        ...

    def close(self) -> None: ...


class Imaging(Protocol):
    """Frames to the pictures that networks take, made where the networks run."""

    def fit(self, frames: Sequence[Frame], facts: DetectorFacts) -> Pictures:
        """Whole frames as the detector takes them: (f, H, W, 3)."""
        ...

    def crop(self, parts: Sequence[tuple[Frame, Floats]], facts: EncoderFacts, look: Look, region: Region) -> Pictures:
        """(n, S, S, 3): one picture per row of all the parts' boxes (k, 4) px, in order; n may be 0."""
        ...

    def mirror(self, pictures: Pictures) -> Pictures:
        """The same with left and right changed."""
        ...


@dataclass(frozen=True)
class Sessions:
    """A bundle's networks for the box, and what makes their pictures.

    smaller: the smaller detector, if it has one. engines: network -> fingerprint of its engine, where there are any.
    """

    detector: Session
    encoder: Session
    imaging: Imaging
    smaller: Session | None = None
    engines: Mapping[str, str] = field(default_factory=dict)


def open_session(graph: Path | bytes, *, threads: int = 0) -> Session:
    """Load an ONNX file, or the bytes of one, on ONNX Runtime.

    threads: CPU threads for one run; 0 takes every core. Raises BackendError.
    """
    from edge.ort import OrtSession

    return OrtSession(graph, threads=threads)


def open_sessions(bundle: Bundle, backend: Backend = "auto", *, threads: int = 0) -> AbstractContextManager[Sessions]:
    """Detectors and image encoder of a bundle, on TensorRT or ONNX Runtime.

    auto is TensorRT where the bundle has engines and the machine an NVIDIA GPU, and else ONNX Runtime: a GPU for which
    none of the engines was built is an error then, never a quiet run on the CPU.

    threads: of a CPU, for one run; 0 takes every core. Raises BundleError: no engine for exactly this device;
    BackendError: a runtime that is missing or refuses.
    """
    match _chosen(bundle) if backend == "auto" else backend:
        case "tensorrt":
            return _on_the_gpu(bundle)
        case _:
            return _on_the_cpu(bundle, threads)


@contextmanager
def _on_the_cpu(bundle: Bundle, threads: int) -> Iterator[Sessions]:
    from edge.imaging import HostImaging
    from edge.ort import OrtSession

    with ExitStack() as held:
        on = {
            network: held.enter_context(
                OrtSession(bundle.file(network), threads=threads, shared=True, rows=ROWS[network])
            )
            for network in bundle.manifest.networks
        }
        yield Sessions(on[DETECTOR], on[IMAGE], HostImaging(), on.get(SMALLER))


@contextmanager
def _on_the_gpu(bundle: Bundle) -> Iterator[Sessions]:
    from edge import trt
    from edge.cuda import open_cuda
    from edge.gpu import CudaImaging

    for network in bundle.manifest.networks:
        bundle.engines_of(network)  # that there are none at all needs no GPU to be said
    with ExitStack() as held:
        cuda = held.enter_context(closing(open_cuda()))
        here = trt.platform(trt.load(), cuda.gpu)

        engines: dict[str, str] = {}

        def opened(network: Network) -> trt.TrtSession:
            name, engine = bundle.engine_for(network, here)
            engines[network] = engine.fingerprint.short()
            plan, built = bundle.file(name).read_bytes(), engine.fingerprint
            return trt.TrtSession(plan, cuda, name=name, batches=built.batches, precision=built.precision)

        on = {network: held.enter_context(opened(network)) for network in bundle.manifest.networks}
        imaging = held.enter_context(closing(CudaImaging(cuda)))
        yield Sessions(on[DETECTOR], on[IMAGE], imaging, on.get(SMALLER), engines)


def _chosen(bundle: Bundle) -> Backend:
    """What "auto" means here."""
    from edge.cuda import gpu_count

    gpus, engines = gpu_count(), bundle.manifest.engines
    if gpus and engines:
        return "tensorrt"
    if gpus:
        log.warning(
            "%s has no engine for the GPU of this machine, which stays idle; `make export` builds one", bundle.path
        )
    elif engines:
        log.warning(
            "no NVIDIA GPU answers here for the engines of %s: the CPU runs its graphs; `edge doctor` says more",
            bundle.path,
        )
    return "onnxruntime"
