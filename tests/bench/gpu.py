"""`python -m tests.bench.gpu`, `make bench-gpu`: what an NVIDIA GPU takes for each stage, beside the CPU next to it.

No figure of it is known yet: it was written on machines without a GPU. Models of full size have random weights: the
work is the same, what they see is not, so that their boxes are replaced by the mini detector's.

Times are between CUDA events. A kernel's is that of many launches in one CUDA graph, divided by their number, since
Python takes longer to ask for one than a GPU to run it; GB/s are of the bytes that have to move, caches or no caches.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import edge.cuda
from edge import jetson, trt
from edge.backend import Feed, OnDevice, Pictures, Session, TensorSpec, open_sessions
from edge.bank import Look
from edge.bundle import Bundle, EncoderFacts, Network, open_bundle
from edge.config import DescribeConfig, DetectConfig, MatchConfig, TrackConfig
from edge.cuda import NO_DRIVER, Cuda
from edge.describe import Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import BackendError, LookoutError
from edge.gpu import CudaImaging
from edge.images import read_image
from edge.placement import cropped
from edge.trt import TrtSession
from edge.values import Backend, Floats, Frame
from export.build import build
from export.engines import build_engines
from export.recipe import read_recipe
from tests.full_size import full_size

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 1920, 1080  # px, a camera's
RUNS, WARM = 200, 20
LAUNCHES = 20  # of a kernel in one graph
FRAMES_ON_CPU = 10
console = Console(width=120)


@dataclass(frozen=True)
class Taken:
    """Milliseconds of one run."""

    median: float
    p95: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Taken:
        middle, high = np.percentile(milliseconds, [50, 95])
        return cls(float(middle), float(high))

    def shared(self, by: int) -> Taken:
        return Taken(self.median / by, self.p95 / by)

    def rate(self, size: int) -> str:
        """GB/s of so many bytes a run."""
        return f"{size / self.median / 1e6:.1f}" if self.median > 0 else "-"


class Tapped:
    """A Cuda that keeps what was launched, for it to be launched again. graphs: False: it records none.

    replays: how often a graph ran.
    """

    def __init__(self, cuda: Cuda, *, graphs: bool = True) -> None:
        self._cuda, self._graphs = cuda, graphs
        self.launches: list[tuple[Any, ...]] = []
        self.replays = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def launch(self, *launch: Any) -> None:
        self.launches.append(launch)
        self._cuda.launch(*launch)

    def record(self, work: Callable[[], None]) -> object | None:
        return self._cuda.record(work) if self._graphs else None

    def replay(self, graph: object) -> None:
        self.replays += 1
        self._cuda.replay(graph)


class Seeing:
    """A detector's session that does its work, and answers what another one said of the only picture there is."""

    def __init__(self, session: Session, answers: Mapping[str, NDArray[Any]]) -> None:
        self._session, self._answers = session, answers
        self.precision, self.about = session.precision, session.about

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._session.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._session.outputs

    def run(self, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        count = len(self._session.run(feeds)["boxes"])
        return {name: np.repeat(answer, count, axis=0) for name, answer in self._answers.items()}

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Seeing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def main() -> int:
    try:
        measure()
    except LookoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure() -> None:
    """Raises BackendError where there is nothing to measure."""
    if not edge.cuda.gpu_count():
        raise BackendError("no NVIDIA GPU here to measure", remedy=NO_DRIVER)
    module = trt.load()
    logging.getLogger("edge.lane").setLevel(logging.ERROR)  # that it runs without a graph is meant here
    with tempfile.TemporaryDirectory() as name, closing(edge.cuda.open_cuda()) as cuda:
        conditions(cuda, module)
        folder, frame = Path(name), camera_frame()
        mini = with_engines(
            build(read_recipe(ROOT / "configs/models-mini.toml"), folder / "mini", lambda step, said: None)
        )
        answers, people = seen(mini, frame)
        pictures(cuda, mini, frame, people)
        full = with_engines(full_size(folder))
        for bundle in (mini, full):
            for network in bundle.manifest.networks:
                engine(cuda, module, bundle, network)
        whole_path("mini pair", mini, frame, None)
        whole_path("YOLOv4-416 and ViT-B/32", full, frame, answers)
        clocks("at the end")


# --- conditions -----------------------------------------------------------------------------------------------------


def conditions(cuda: Cuda, module: Any) -> None:
    gpu, root = cuda.gpu, Path("/")
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"[bold]conditions[/] {gpu.name}, sm_{gpu.compute_capability.replace('.', '')}, ", end="")
    console.print(f"{gpu.memory / 2**30:.1f} GiB, {cuda.free_memory() / 2**30:.1f} of them free", highlight=False)
    versions = f"TensorRT {module.__version__}, {cuda.about}, driver {jetson.driver(root) or 'unknown'}"
    console.print(f"  {versions} for CUDA {cuda.driver}", highlight=False)
    host = f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, load {load}"
    console.print(f"  {host}", highlight=False)
    if board := jetson.board(root):
        console.print(f"  {board}, JetPack {jetson.jetpack(root) or 'unknown'}, power mode {power_mode(root)}")
    clocks("at the start")


def power_mode(root: Path) -> str:
    mode = jetson.power_mode(root)
    return "unknown" if mode is None else mode[1].get(mode[0], str(mode[0]))


def clocks(when: str) -> None:
    """What slows a GPU down: a Jetson's from its files, others' as nvidia-smi tells them."""
    if clock := jetson.gpu_clock(Path("/")):
        told = f"GPU clock {clock.now / 1e6:.0f} MHz of {clock.least / 1e6:.0f} to {clock.most / 1e6:.0f}"
    elif program := shutil.which("nvidia-smi"):
        asked = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
        command = [program, f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        told = f"{asked}: {done.stdout.strip()}" if not done.returncode else "clocks unknown"
    else:
        told = "clocks unknown"
    console.print(f"  {when}: {told}", highlight=False)


# --- what is measured on ----------------------------------------------------------------------------------------------


def with_engines(bundle: Bundle) -> Bundle:
    start = time.perf_counter()

    def say(step: str, said: str) -> None:
        console.print(f"  {bundle.manifest.name}: {said}", highlight=False)

    build_engines(bundle.path, say, lambda stage, done, total: None)
    console.print(
        f"  {bundle.manifest.name}: built and held against ONNX Runtime in {time.perf_counter() - start:.0f} s"
    )
    return open_bundle(bundle.path)


def camera_frame() -> Frame:
    """The golden picture at a camera's size."""
    picture = cv2.resize(read_image(ROOT / "export/mini/pets-650.jpg"), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return Frame("bench", 0, 0.0, np.asarray(picture, np.uint8))


def seen(mini: Bundle, frame: Frame) -> tuple[dict[str, NDArray[Any]], Floats]:
    """What the mini detector says of the frame on the CPU, and its people's boxes (n, 4) px."""
    with open_sessions(mini, "onnxruntime") as on:
        answers = on.detector.run({"image": on.imaging.fit([frame], mini.manifest.detector)})
        (people,) = Detector(on.detector, mini.manifest.detector, DetectConfig())([frame])
    return answers, people.boxes


# --- times ------------------------------------------------------------------------------------------------------------


def timed(cuda: Cuda, work: Callable[[], object]) -> Taken:
    """Each run between two events."""
    for _ in range(WARM):
        work()
    cuda.synchronize()
    marks = []
    for _ in range(RUNS):
        start = cuda.event()
        work()
        marks.append((start, cuda.event()))
    cuda.synchronize()
    return Taken.of([cuda.milliseconds(start, end) for start, end in marks])


def by_the_clock(work: Callable[[], object], runs: int) -> Taken:
    """Of the host, for what does not happen on the GPU alone."""
    taken = []
    for turn in range(runs + 2):
        start = time.perf_counter()
        work()
        if turn >= 2:  # the first ones plan their memory
            taken.append((time.perf_counter() - start) * 1000)
    return Taken.of(taken)


def kernel_time(cuda: Cuda, launch: tuple[Any, ...]) -> tuple[Taken, str]:
    """One launch of those that were tapped, and how it was measured."""

    def many() -> None:
        for _ in range(LAUNCHES):
            cuda.launch(*launch)

    graph = cuda.record(many)
    if graph is None:
        return timed(cuda, many).shared(LAUNCHES), "with Python's share"
    return timed(cuda, functools.partial(cuda.replay, graph)).shared(LAUNCHES), "in a graph"


def pictures(cuda: Cuda, mini: Bundle, frame: Frame, people: Floats) -> None:
    """Upload, and the kernels that make pictures."""
    table = Table("", "median µs", "p95 µs", "GB/s", "bytes", "", title=f"pictures of a {WIDTH}x{HEIGHT} frame")

    def row(what: str, taken: Taken, size: int, how: str = "") -> None:
        times = (f"{1000 * taken.median:.1f}", f"{1000 * taken.p95:.1f}")
        table.add_row(what, *times, taken.rate(size), f"{size:,}", how)

    size = frame.image.nbytes
    address, pinned = cuda.allocate(size), cuda.pin(size)
    staged = pinned.reshape(frame.image.shape)
    row("copy to page-locked memory", by_the_clock(lambda: np.copyto(staged, frame.image), RUNS), size, "by the CPU")
    row("upload from there", timed(cuda, lambda: cuda.upload(address, pinned)), size, "one copy")
    cuda.synchronize()
    cuda.unpin(pinned)
    cuda.free(address)

    facts, vit = mini.manifest.detector, mini.manifest.encoder.model_copy(update={"size": 224})
    tap = Tapped(cuda)
    with closing(CudaImaging(tap)) as imaging:
        made = imaging.fit([frame], facts)
        # bilinear reads four pixels of the frame for one of its own, and none twice where it shrinks
        moved = bytes_of(made) + min(size, 4 * bytes_of(made))
        row(f"fit to {facts.width}x{facts.height}", *around(kernel_time(cuda, tap.launches[-1]), moved))
        for count in (1, 8, 32, 64):
            boxes = people[np.arange(count) % len(people)]
            made = imaging.crop([(frame, boxes)], vit, Look(), "whole")
            moved = bytes_of(made) + source_bytes(boxes, vit)
            row(f"crop {count} to {vit.size}x{vit.size}", *around(kernel_time(cuda, tap.launches[-1]), moved))
        imaging.mirror(made)
        row("mirror those", *around(kernel_time(cuda, tap.launches[-1]), 2 * bytes_of(made)))
    console.print(table)


def around(measured: tuple[Taken, str], size: int) -> tuple[Taken, int, str]:
    taken, how = measured
    return taken, size, how


def bytes_of(made: Pictures) -> int:
    return int(np.prod(made.shape))


def source_bytes(boxes: Floats, facts: EncoderFacts) -> int:
    """Of the parts of a frame that crops are made of: all of their pixels are averaged."""
    x1, y1, x2, y2 = cropped(boxes, WIDTH, HEIGHT, facts, Look(), "whole").sources.T.astype(np.int64)
    return int(3 * ((x2 - x1) * (y2 - y1)).sum())


def engine(cuda: Cuda, module: Any, bundle: Bundle, network: Network) -> None:
    """From pictures in the GPU's memory to answers in the host's, with a CUDA graph and without, for each batch."""
    name, facts = bundle.engine_for(network, trt.platform(module, cuda.gpu))
    plan, batches = bundle.file(name).read_bytes(), facts.fingerprint.batches
    table = Table("batch", "median ms", "p95 ms", "pictures/s", "without graph", "CUDA graph")
    table.title = f"{bundle.manifest.name}: {network}{', fp32: ' + ' and '.join(facts.held) if facts.held else ''}"
    with ExitStack() as opened:
        sessions = []
        for graphs in (True, False):
            tap = Tapped(cuda, graphs=graphs)
            session = TrtSession(plan, tap, name=name, batches=batches, trt=module)
            sessions.append((tap, opened.enter_context(session)))
        (spec,) = sessions[0][1].inputs.values()
        row = tuple(size or 0 for size in spec.shape[1:])
        noise = np.random.default_rng(0).integers(0, 256, (batches[-1], *row), np.uint8)
        address = cuda.allocate(noise.nbytes)
        opened.callback(cuda.free, address)
        cuda.upload(address, noise)
        cuda.synchronize()
        for batch in batches:
            given = {"image": OnDevice(address, (batch, *row))}  # type: ignore[arg-type]
            (tap, with_graph), (_, without) = sessions
            replays = tap.replays
            taken = timed(cuda, functools.partial(with_graph.run, given))
            plain = timed(cuda, functools.partial(without.run, given))
            told = "yes" if tap.replays > replays else "not recorded"
            rate = f"{1000 * batch / taken.median:.0f}"
            table.add_row(str(batch), f"{taken.median:.3f}", f"{taken.p95:.3f}", rate, f"{plain.median:.3f}", told)
    console.print(table)


def whole_path(title: str, bundle: Bundle, frame: Frame, answers: Mapping[str, NDArray[Any]] | None) -> None:
    """A frame at a time through every stage but capture and publish, on TensorRT and on ONNX Runtime.

    answers: the detector's, in place of its own. Where crops are made by the GPU they are only asked for in "crop", and
    waited for in "encode".
    """
    columns = ("median ms", "p95 ms", "frames/s", "detect", "crop", "encode", "people")
    table = Table("runtime", *columns, title=f"{title}, one frame at a time")
    match = MatchConfig(sensitive=tuple(category.name for category in bundle.bank.categories))
    config, facts = DescribeConfig(track=TrackConfig(enabled=False), match=match), bundle.manifest
    medians: list[float] = []
    backends: tuple[tuple[Backend, int], ...] = (("tensorrt", RUNS), ("onnxruntime", FRAMES_ON_CPU))
    for backend, runs in backends:
        with open_sessions(bundle, backend) as on:
            session: Session = on.detector if answers is None else Seeing(on.detector, answers)
            detector = Detector(session, facts.detector, config.detect, imaging=on.imaging)
            describer = Describer(bundle, detector, Encoder(on.encoder, facts.encoder), config, imaging=on.imaging)
            (one,) = describer([frame])
            taken = by_the_clock(functools.partial(describer, [frame]), runs)
            stages = [f"{np.median(describer.timings.stages[stage]):.2f}" for stage in ("detect", "crop", "encode")]
            figures = f"{taken.median:.2f}", f"{taken.p95:.2f}", f"{1000 / taken.median:.1f}"
            table.add_row(on.encoder.about, *figures, *stages, str(len(one.people)))
        medians.append(taken.median)
    console.print(table)
    ratio = medians[1] / medians[0]
    console.print(f"  in the same run ONNX Runtime in fp32 on the CPU takes {ratio:.1f} times as long", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
