"""`make bench`: how long each stage takes and what it needs, on this machine, with its conditions.

The models of full size have random weights: the work is the same, what they see is not. Their detector's boxes are
replaced by the mini detector's, so that crops and batches are those of a real scene.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import onnxruntime
import psutil
import zmq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from edge.backend import Session, TensorSpec, open_session
from edge.bundle import DETECTOR, IMAGE, SMALLER, Bundle
from edge.config import DescribeConfig, DetectConfig, MatchConfig, PublishConfig, SpoolConfig, TrackConfig
from edge.describe import Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import LookoutError
from edge.images import read_image
from edge.pipeline import Reporter
from edge.publish import Publisher
from edge.spool import Spool
from edge.values import Frame
from export.build import build
from export.recipe import read_recipe
from export.samples import find_sample
from export.weights import cache_folder
from tests.clip_states import random_state
from tests.darknet_nets import write_weights, yolov4
from tests.pets import TRUTH, frames_of, precision_and_recall, truth_from

ROOT = Path(__file__).parents[2]
FARTHER = 0.6  # times as large: people as a camera sees them from 1.7 times as far away
console = Console(width=110)


class Timed:
    """A session that counts the milliseconds spent inside the network; a detector's boxes may come from elsewhere."""

    def __init__(self, session: Session, boxes_of: Session | None = None) -> None:
        self._session, self._boxes_of = session, boxes_of
        self.ms = 0.0

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._session.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._session.outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self._session.run(feeds)
        if self._boxes_of:
            outputs = self._boxes_of.run(feeds)
        self.ms += (time.perf_counter() - start) * 1000
        return outputs

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conditions()
        frames = sample_frames()
        mini = bundle_from(ROOT / "configs/models-mini.toml", folder)
        full = bundle_from(full_size_recipe(folder), folder)
        with open_session(mini.file(DETECTOR)) as boxes:
            with open_session(mini.file(IMAGE)) as image:
                stages("mini pair", frames, mini, Timed(boxes), Timed(image))
            with open_session(full.file(DETECTOR)) as detector, open_session(full.file(IMAGE)) as image:
                stages("YOLOv4-416 and ViT-B/32", frames[::4], full, Timed(detector, boxes), Timed(image))
                batches(image, full.manifest.encoder.size)
            pets(mini)
        box_process(folder, mini.path, ROOT / "export/mini")
        box_process(folder, full.path)


def bundle_from(recipe: Path, engines: Path) -> Bundle:
    chosen = read_recipe(recipe)
    console.print(f"[bold]building {chosen.name}[/]")

    def say(step: str, said: str) -> None:
        console.print(f"  {step}: {said}", highlight=False)

    return build(chosen, engines / chosen.name, say)


def full_size_recipe(folder: Path) -> Path:
    """YOLOv4-416 and ViT-B/32 with random weights, in the official files' formats and sizes."""
    (folder / "yolov4.cfg").write_text(yolov4(416, 416))
    write_weights(folder / "yolov4.cfg", folder / "yolov4.weights")
    vit = {"image_size": 224, "patch": 32, "width": 768, "layers": 12, "dim": 512}
    state = random_state(**vit, text_width=512, text_layers=12, vocab=49408, context=77, dtype=np.float16)
    save_file(state, folder / "vit.safetensors")
    text = (ROOT / "configs/models-full.toml").read_text().replace('"../', f'"{ROOT}/')
    for official, file in {
        "official:yolov4.cfg": folder / "yolov4.cfg",
        "official:yolov4.weights": folder / "yolov4.weights",
        "official:ViT-B-32.pt": folder / "vit.safetensors",
        "official:bpe_simple_vocab_16e6.txt.gz": ROOT / "export/mini/bpe_simple_vocab_16e6.txt.gz",
    }.items():
        text = text.replace(official, str(file))
    (folder / "full.toml").write_text(text)
    return folder / "full.toml"


def conditions() -> None:
    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"[bold]conditions[/] {(names or [platform.machine()])[0]}, {os.cpu_count()} cores, load {load}")
    versions = f"ONNX Runtime {onnxruntime.__version__}, OpenCV {cv2.__version__}"
    console.print(f"  {platform.platform()}, Python {platform.python_version()}, {versions}")


def cpu_lines() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().splitlines() if cpuinfo.exists() else []


def sample_frames() -> list[Frame]:
    """40 frames of the sample video, or the golden picture where the video cannot be had."""
    try:
        return [frame for number, frame in frames_of(find_sample(cache=cache_folder()), 501, 700) if number % 5 == 0]
    except LookoutError as error:
        console.print(f"  no sample video ({error}): the golden picture stands in")
        return [Frame("pets", i, 0.0, read_image(ROOT / "export/mini/pets-650.jpg")) for i in range(40)]


def stages(title: str, frames: Sequence[Frame], bundle: Bundle, detector: Timed, image: Timed) -> None:
    """Median and p95 of each stage over `frames`, one frame at a time, and what the two networks do not account for."""
    facts = bundle.manifest
    describer = Describer(
        bundle,
        Detector(detector, facts.detector, DetectConfig()),
        Encoder(image, facts.encoder),
        DescribeConfig(
            track=TrackConfig(enabled=False),
            match=MatchConfig(sensitive=tuple(category.name for category in bundle.bank.categories)),
        ),
    )
    reporter = Reporter("bench", facts.seal(), facts.files[IMAGE], top_k=3, crops=False)
    target = " (target: under 5 %)" if title.startswith("YOLOv4-416") else ""  # set for the models of full size
    outside, people = [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        Spool(SpoolConfig(path=Path(folder) / "spool.db")) as spool,
        Publisher(PublishConfig(address="tcp://127.0.0.1:1", linger_ms=0), "bench", spool) as publisher,
    ):
        describer(frames[:1])  # the first run plans its memory
        describer.timings.stages.clear()
        for frame in frames:
            detector.ms = image.ms = 0.0
            start = time.perf_counter()
            (described,) = describer([frame])
            with describer.timings.measure("publish", 1):
                publisher.send(partial(reporter.event, described=described))
            whole = (time.perf_counter() - start) * 1000
            outside.append((whole - detector.ms - image.ms) / whole)
            people += len(described.people)
    console.print(f"[bold]{title}[/]: {len(frames)} frames, {people / len(frames):.1f} people each")
    table = Table("stage", "median ms", "p95 ms")
    for stage, taken in describer.timings.stages.items():
        table.add_row(stage, *(f"{value:.1f}" for value in np.percentile(taken, [50, 95])))
    console.print(table)
    console.print(f"  outside the two networks: median {np.median(outside):.1%} of a frame{target}")


def batches(image: Session, size: int) -> None:
    table = Table("batch", "median ms", "p95 ms", "crops/s", title="ViT-B/32 image tower")
    for batch in (1, 4, 8, 16):
        crops = np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8)
        middle, high = timed(partial(image.run, {"image": crops}), 10)
        table.add_row(str(batch), f"{middle:.0f}", f"{high:.0f}", f"{1000 * batch / middle:.1f}")
    console.print(table)


def timed(act: Callable[[], object], times: int) -> tuple[float, float]:
    """Median and p95 in ms, after one run for warmth."""
    act()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append((time.perf_counter() - start) * 1000)
    middle, high = np.percentile(taken, [50, 95])
    return float(middle), float(high)


def pets(mini: Bundle) -> None:
    """Frames 501 to 795: those the mini detector was not trained on, at both of its sizes, one after the other."""
    if not TRUTH.exists():
        console.print("PETS: skipped, there are no true boxes at ../shared/data/pets/gt.txt")
        return
    truth = {number: boxes for number, boxes in truth_from(TRUTH).items() if number > 500}
    frames = list(frames_of(find_sample(cache=cache_folder()), 501, 795))
    columns = ("precision", "recall", f"recall of people {FARTHER} times as large", "median ms")
    table = Table("mini detector", *columns, title="PETS09-S2L1 frames 501-795, in %")
    far, far_truth = [(n, shrunk(one)) for n, one in frames[::5]], {n: FARTHER * one for n, one in truth.items()}
    for network, facts in ((DETECTOR, mini.manifest.detector), (SMALLER, mini.manifest.smaller)):
        if facts is None:
            continue
        with open_session(mini.file(network)) as session:
            detector = Detector(session, facts, DetectConfig())
            seen, seen_far = (precision_and_recall(detector, *at) for at in ((frames, truth), (far, far_truth)))
            shares = [*seen, seen_far[1]]
            middle, _ = timed(partial(detector, [frames[0][1]]), 100)
        table.add_row(f"{facts.width} x {facts.height}", *(f"{100 * one:.1f}" for one in shares), f"{middle:.1f}")
    console.print(table)


def shrunk(frame: Frame) -> Frame:
    """In the corner of a grey frame of the same size."""
    small = cv2.resize(frame.image, None, fx=FARTHER, fy=FARTHER, interpolation=cv2.INTER_AREA)
    image = np.full_like(frame.image, 128)
    image[: small.shape[0], : small.shape[1]] = small
    return replace(frame, image=image)


def box_process(folder: Path, bundle: Path, source: Path | None = None) -> None:
    """A real `edge run`: from its start to readiness, memory while it waits for a camera, and, where `source` holds a
    picture the bundle's detector makes sense of, the time from its start to the first result, and peak memory."""
    with socket.socket() as silent, zmq.Context() as context, context.socket(zmq.PULL) as collector:
        silent.bind(("127.0.0.1", 0))  # bound, not listening: a camera that refuses
        port = collector.bind_to_random_port("tcp://127.0.0.1")
        start = time.perf_counter()
        idle = edge_run(folder, bundle, port, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert idle.stderr is not None
        while "camera(s)" not in (line := idle.stderr.readline()):
            assert line, "the box ended"
        ready = time.perf_counter() - start
        time.sleep(3)  # idle is what is measured
        resident = psutil.Process(idle.pid).memory_info().rss / 2**20
        idle.kill()
        idle.communicate()
        console.print(f"a box with the {bundle.name} bundle: ready after {ready:.2f} s, idle {resident:.0f} MB")
        if source is None:
            return
        taken, peak = [], 0
        for _ in range(5):
            start = time.perf_counter()
            box = edge_run(folder, bundle, port, str(source))
            collector.recv_multipart()
            taken.append(time.perf_counter() - start)
            while (now := high_water(box.pid)) and box.poll() is None:
                peak = max(peak, now)
                time.sleep(0.02)  # the box has the cores
            box.communicate()
    console.print(
        f"  start to first result: median {np.median(taken):.2f} s (target: under 3), peak {peak / 1024:.0f} MB"
    )
    console.print("  (target for idle memory: under 200 MB)")


def high_water(pid: int) -> int:
    """The most memory the process has had resident, kB; 0 once it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def edge_run(folder: Path, bundle: Path, port: int, source: str) -> subprocess.Popen[str]:
    (folder / "edge.toml").write_text(
        f'device = "bench"\nbundle = "{bundle}"\n[publish]\naddress = "tcp://127.0.0.1:{port}"\ntransport = "push"\n'
        f'[health]\naddress = ""\n[[camera]]\nname = "c"\nsource = "{source}"\n'
    )
    words = [sys.executable, "-c", "from edge.cli import main; main()", "run", "--config", str(folder / "edge.toml")]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
