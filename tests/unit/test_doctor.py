"""What `edge doctor` says of made-up machines, of files that are broken, of cameras that answer and that do not."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import jetson, probes
from edge.bundle import (
    DETECTOR,
    HALF,
    IMAGE,
    MANIFEST,
    Bundle,
    EngineFacts,
    EnginePlan,
    Fingerprint,
    Network,
    Platform,
    open_bundle,
)
from edge.config import CameraConfig, EdgeConfig, PublishConfig, RuntimeConfig, SpoolConfig
from edge.doctor import cameras, collector, disk, engines, examine, exit_code, look, show, to_json
from edge.pairs import KNOWN_BAD, Versions, known_bad
from edge.probes import Finding, Seen
from edge.reach import reach
from edge.values import Backend
from tests.fakes import CONTENTS, SMALLER_FACTS, manifest, sha256, write_bundle

SECRET = "hunter2"
ORIN = Platform(tensorrt="10.3.0", compute_capability="8.7", gpu="Orin")
DPKG = """Package: nvidia-jetpack
Status: install ok installed
Version: 6.2.1+b38

Package: python3-libnvinfer
Status: install ok installed
Architecture: arm64
Version: 10.3.0.30-1+cuda12.5

Package: python3-gone
Status: deinstall ok config-files
Version: 1.0
"""
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64\n",
    "var/lib/dpkg/status": DPKG,
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=0 >\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "1\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48562\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "49187\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "proc/meminfo": "MemTotal:  7802884 kB\nMemFree: 100 kB\nMemAvailable:  5242880 kB\nSwapTotal:  3901440 kB\n",
    "usr/local/cuda-12.6/version.json": "{}",
    "run/systemd/timesync/synchronized": "",
}
ORIN_SEEN = Seen(
    architecture="aarch64", python="3.10.12", tensorrt="10.3.0", gpus=1, gpu="Orin", compute_capability="8.7",
    memory=7802884 << 10, binding="cuda.bindings 12.6.2", cuda="12.6", here=ORIN, synchronised=True, off_chip=None,
)  # fmt: skip
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic, EABI: aarch64\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1",
    "proc/meminfo": "MemTotal: 128000000 kB\nMemAvailable: 120000000 kB\n",
}
THOR_SEEN = Seen(
    architecture="aarch64", python="3.12.3", tensorrt="10.13.3", gpus=1, gpu="NVIDIA Thor", compute_capability="11.0",
    memory=1 << 36, binding="cuda.bindings 13.0.3", cuda="13.0", synchronised=True, off_chip="no element rtspsrc",
)  # fmt: skip
WORKSTATION = {
    "sys/class/dmi/id/product_name": "Tower 7\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n",
    "proc/meminfo": "MemTotal: 65000000 kB\nMemAvailable: 60000000 kB\nSwapTotal: 0 kB\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in findings}


# --- machines ---------------------------------------------------------------------------------------------------------


def test_an_orin_nano_on_jetpack_6(tmp_path: Path) -> None:
    found = by_name(examine(None, tree(tmp_path, ORIN_NANO), ORIN_SEEN))
    assert {name: (one.value, one.state) for name, one in found.items()} == {
        "machine": ("NVIDIA Jetson Orin Nano Developer Kit, aarch64", "good"),
        "JetPack": ("6.2.1 (Jetson Linux 36.4.4)", "good"),
        "NVIDIA driver": ("540.4.0, for CUDA 12.6", "good"),
        "GPU": ("Orin, sm_87, 7.4 GiB, through cuda.bindings 12.6.2", "good"),
        "TensorRT": ("10.3.0", "good"),
        "Python": ("3.10.12", "good"),
        "video decoding": ("GStreamer, by NVIDIA's decoder", "good"),
        "power mode": ("0 (15W)", "note"),
        "GPU clock": ("306 MHz of 306 to 625", "note"),
        "temperature": ("49 °C (gpu-thermal)", "good"),
        "memory": ("5.0 GiB free of 7.4 GiB, 3.7 GiB of swap", "good"),
        "clock": ("synchronised", "good"),
        "known to go wrong": ("TensorRT 10.3 to 10.7 and vision transformers", "note"),
    }
    assert "`sudo nvpmodel -m 2`" in (found["power mode"].say or "")
    assert "`sudo jetson_clocks`" in (found["GPU clock"].say or "")
    assert "issues/4334" in (found["known to go wrong"].say or "")


def test_a_thor_on_jetpack_7(tmp_path: Path) -> None:
    found = by_name(examine(None, tree(tmp_path, THOR), THOR_SEEN))
    assert found["JetPack"] == Finding("JetPack", "7.1 (Jetson Linux 38.4.0)")
    assert found["GPU clock"] == Finding("GPU clock", "1575 MHz of 1575 to 1575")
    assert found["video decoding"].state == "warning"
    assert "out of reach: no element rtspsrc; `sudo apt install python3-gi " in (found["video decoding"].say or "")
    assert found["Python"].state == found["memory"].state == found["known to go wrong"].state == "good"
    assert found["power mode"] == Finding("power mode", "unknown", "note")


def test_a_workstation_with_a_driver_and_nothing_for_python(tmp_path: Path) -> None:
    seen = Seen(architecture="x86_64", python="3.11.7", gpus=1, refused="no Python binding for CUDA here; install one")
    found = by_name(examine(None, tree(tmp_path, WORKSTATION), seen))
    assert "JetPack" not in found
    assert "power mode" not in found
    assert found["machine"].value == "Tower 7, x86_64"
    assert found["video decoding"] == Finding("video decoding", "FFmpeg, by the CPU")
    assert found["NVIDIA driver"].value == "535.183.01"
    assert found["GPU"] == Finding("GPU", "1, not opened", "warning", "no Python binding for CUDA here; install one")
    assert found["TensorRT"].say == "`pip install tensorrt`"


def test_a_machine_with_nothing(tmp_path: Path) -> None:
    findings = examine(None, tmp_path, Seen())
    assert {one.state for one in findings} <= {"good", "note"}
    assert by_name(findings)["clock"] == Finding("clock", "unknown", "note")
    assert by_name(findings)["machine"].value == "unknown, unknown"
    assert by_name(findings)["GPU"].state == "note"
    assert exit_code(findings) == 0


def test_this_machine_is_looked_at_without_an_error() -> None:
    start = time.monotonic()
    seen = look()
    assert time.monotonic() - start < 30
    assert seen.python.startswith("3.")
    assert seen.architecture
    assert not [one for one in examine(None) if one.value == "unknown" and one.state == "warning"]


@pytest.mark.parametrize(
    ("release", "linux", "pack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081", "36.4.3", "6.2"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "36.3.0", "6.0"),
        ("# R36 (release), REVISION: 9.9, GCID: 1", "36.9.9", "6"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "39.2.0", "7.2"),
        ("# R39 (release), REVISION: 7, GCID: 1", "39.7.0", "7"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", "35.4.1", "5"),
        ("# R99 (release), REVISION: 4.1, GCID: 1", "99.4.1", None),
        ("", None, None),
        ("R36", None, None),
    ],
)
def test_jetpack_by_its_linux(release: str, linux: str | None, pack: str | None, tmp_path: Path) -> None:
    tree(tmp_path, {"etc/nv_tegra_release": release})
    assert (jetson.l4t(tmp_path), jetson.jetpack(tmp_path)) == (linux, pack)


def test_a_package_counts_where_it_is_installed(tmp_path: Path) -> None:
    tree(tmp_path, {"var/lib/dpkg/status": DPKG})
    assert jetson.package(tmp_path, "python3-libnvinfer") == "10.3.0.30-1+cuda12.5"
    assert jetson.package(tmp_path, "python3-gone") is None
    assert jetson.package(tmp_path, "libnvinfer") is None


def test_heat_that_slows_down_is_told(tmp_path: Path) -> None:
    tree(tmp_path, {**ORIN_NANO, "sys/class/thermal/cooling_device1/cur_state": "1"})
    found = probes.temperature(tmp_path)
    assert (found.value, found.state) == ("49 °C (gpu-thermal), throttled: gpu", "warning")


def test_little_memory_on_a_jetson_is_told(tmp_path: Path) -> None:
    tree(tmp_path, {**ORIN_NANO, "proc/meminfo": "MemTotal: 7802884 kB\nMemAvailable: 1048576 kB\nSwapTotal: 0 kB\n"})
    found = probes.memory(tmp_path)
    assert found.state == "warning"
    assert "isolate multi-user.target" in (found.say or "")
    (tmp_path / "etc/nv_tegra_release").unlink()
    assert probes.memory(tmp_path).state == "good"  # elsewhere the GPU has memory of its own


def test_a_tensorrt_that_this_python_does_not_see(tmp_path: Path) -> None:
    tree(tmp_path, ORIN_NANO)
    blind = replace(ORIN_SEEN, tensorrt="", here=None)
    apart = probes.tensorrt(tmp_path, replace(blind, apart=True))
    assert apart.state == "warning"
    assert "--system-site-packages" in (apart.say or "")
    other = replace(blind, python="3.12.1")
    assert "not for this Python" in probes.tensorrt(tmp_path, other).value
    assert "Python 3.10" in (probes.python(tmp_path, other).say or "")
    (tmp_path / "var/lib/dpkg/status").unlink()
    assert probes.tensorrt(tmp_path, blind).say == "`sudo apt install nvidia-jetpack`"


def test_a_gpu_that_its_driver_does_not_offer(tmp_path: Path) -> None:
    found = probes.gpu(tree(tmp_path, ORIN_NANO), Seen())
    assert found.state == "warning"
    assert "groups" in (found.say or "")


@pytest.mark.parametrize(
    ("kernel", "daemon", "state"),
    [
        (True, False, "good"),
        (False, True, "good"),
        (False, False, "warning"),
        (None, False, "note"),
        (None, True, "good"),
    ],
)
def test_the_clock(kernel: bool | None, daemon: bool, state: str, tmp_path: Path) -> None:
    if daemon:
        tree(tmp_path, {"run/systemd/timesync/synchronized": ""})
    found = probes.clock(tmp_path, Seen(synchronised=kernel))
    assert found.state == state
    assert ("timedatectl" in (found.say or "")) == (state == "warning")


# --- broken files -----------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(ORIN_NANO)), content=st.binary(max_size=80))
def test_no_file_breaks_it(name: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tree(tmp_path_factory.mktemp("root"), ORIN_NANO)
    (root / name).write_bytes(content)
    findings = examine(None, root, ORIN_SEEN)
    assert not [one for one in findings if "could not be looked at" in (one.say or "")]
    json.loads(to_json(findings))


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    for name in ORIN_NANO:
        (tmp_path / name).mkdir(parents=True)
    assert exit_code(examine(None, tmp_path, Seen())) == 0


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    tree(tmp_path, ORIN_NANO)
    loop = tmp_path / "etc/nv_tegra_release"
    loop.unlink()
    loop.symlink_to(loop)  # also root cannot read it
    assert jetson.l4t(tmp_path) is None


def test_a_probe_that_fails_is_a_finding(tmp_path: Path) -> None:
    odd = replace(ORIN_SEEN, compute_capability=None)  # type: ignore[arg-type]
    findings = examine(None, tmp_path, odd)
    (one,) = [one for one in findings if one.name == "GPU"]
    assert one.value == "unknown"
    assert one.state == "warning"
    assert "AttributeError" in (one.say or "")
    assert {"machine", "clock"} <= set(by_name(findings)), "the others go on"


# --- known to go wrong ------------------------------------------------------------------------------------------------

PLANTED = [
    ("TensorRT 10.3 to 10.7 and vision transformers", Versions(tensorrt=(10, 3, 0)), Versions(tensorrt=(10, 8, 0))),
    ("TensorRT 10.3 to 10.7 and vision transformers", Versions(tensorrt=(10, 7, 1)), Versions(tensorrt=(10, 2, 0))),
    (
        "sm_120 and half-precision attention",
        Versions(tensorrt=(10, 16, 1), compute_capability=(12, 0)),
        Versions(tensorrt=(10, 16, 1), compute_capability=(8, 7)),
    ),
    ("TensorRT before 8.6", Versions(tensorrt=(8, 5, 2)), Versions(tensorrt=(8, 6, 1))),
    (
        "TensorRT 8 and Python 3.12 or newer",
        Versions(packaged=(8, 6, 2), python=(3, 12, 0)),
        Versions(packaged=(8, 6, 2), python=(3, 10, 0)),
    ),
    ("JetPack 5 and older", Versions(l4t=(35, 4, 1)), Versions(l4t=(36, 3, 0))),
    (
        "GPUs before sm_75 and CUDA 13",
        Versions(compute_capability=(7, 0), cuda=(13, 0), binding="cuda.bindings", binding_version=(13, 0)),
        Versions(compute_capability=(7, 0), cuda=(13, 0), binding="cuda.bindings", binding_version=(12, 9)),
    ),
    (
        "GPUs before sm_75 and CUDA 13",
        Versions(compute_capability=(6, 1), cuda=(13, 0), binding="pycuda", toolkits=((13, 0),)),
        Versions(compute_capability=(6, 1), cuda=(13, 0), binding="pycuda", toolkits=((12, 6),)),
    ),
    (
        "cuda-bindings newer than the driver",
        Versions(binding="cuda.bindings", binding_version=(13, 0), cuda=(12, 6)),
        Versions(binding="cuda.bindings", binding_version=(12, 9), cuda=(12, 6)),
    ),
    (
        "pycuda among several CUDA toolkits",
        Versions(binding="pycuda", toolkits=((12, 2), (12, 6))),
        Versions(binding="pycuda", toolkits=((12, 6),)),
    ),
    ("Jetson Linux since 36.4.7 and large allocations", Versions(l4t=(36, 4, 7)), Versions(l4t=(36, 4, 4))),
]


@pytest.mark.parametrize(("name", "bad", "fine"), PLANTED)
def test_a_known_pair_is_found_and_its_neighbour_is_not(name: str, bad: Versions, fine: Versions) -> None:
    assert [one.name for one in known_bad(bad)] == [name]
    assert name not in [one.name for one in known_bad(fine)]


def test_every_known_pair_is_planted_and_has_a_source() -> None:
    assert {one.name for one in KNOWN_BAD} == {name for name, *_ in PLANTED}
    assert all(one.source.startswith("https://") for one in KNOWN_BAD)


def test_of_what_is_unknown_nothing_is_said() -> None:
    assert known_bad(Versions()) == []


def test_versions_come_from_files_and_libraries(tmp_path: Path) -> None:
    tree(tmp_path, {**ORIN_NANO, "usr/local/cuda-12.2/x": "", "usr/local/cuda/x": ""})
    seen = replace(ORIN_SEEN, binding="pycuda 2025.1", tensorrt="10.8.0")
    assert [one.value for one in examine(None, tmp_path, seen) if one.name == "known to go wrong"] == [
        "pycuda among several CUDA toolkits"
    ]


# --- bundle and engines -----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """With both engines for ORIN."""
    folder, plan = (
        write_bundle(tmp_path / "bundle"),
        EnginePlan(detector_batches=(1,), encoder_batches=(1, 8), workspace_mib=64),
    )
    contents, built = {**CONTENTS, **{name: name.encode() for name in HALF.values()}}, {}
    networks: tuple[Network, ...] = (DETECTOR, IMAGE)
    for network in networks:
        graph = HALF[network]
        batches = plan.batches(network)
        one = Fingerprint(platform=ORIN, precision="fp16", onnx_sha256=sha256(contents[graph]), batches=batches)
        name = f"{network.removesuffix('.onnx')}-{one.short()}.engine"
        contents[name] = b"a plan"
        built[name] = EngineFacts(
            network=network, graph=graph, fingerprint=one, held=("attention",), verified="cosine 0.9999"
        )
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sums = {name: sha256(content) for name, content in contents.items()}
    (folder / MANIFEST).write_text(manifest(files=sums, engine=plan, engines=built).to_json())
    return open_bundle(folder)


def test_engines_for_exactly_this_machine(bundle: Bundle) -> None:
    found = engines(bundle, ORIN_SEEN, "auto")
    assert [one.name for one in found] == ["engine of detector.onnx", "engine of image.onnx"]
    assert {one.state for one in found} == {"good"}
    assert "cosine 0.9999; in fp32: attention" in found[1].value


def test_a_smaller_detector_without_an_engine_is_bad_too(bundle: Bundle) -> None:
    with_one = replace(bundle, manifest=bundle.manifest.model_copy(update={"smaller": SMALLER_FACTS}))
    found = engines(with_one, ORIN_SEEN, "auto")
    names = ["engine of detector.onnx", "engine of detector-smaller.onnx", "engine of image.onnx"]
    assert [(one.name, one.state) for one in found] == list(zip(names, ["good", "bad", "good"], strict=True))
    assert "make export" in (found[1].say or "")


def test_engines_for_another_tensorrt_are_bad(bundle: Bundle) -> None:
    here = ORIN.model_copy(update={"tensorrt": "10.7.0"})
    found = engines(bundle, replace(ORIN_SEEN, here=here), "auto")
    assert [one.state for one in found] == ["bad", "bad"]
    assert "TensorRT" in (found[0].say or "")
    assert "make export" in (found[0].say or "")
    assert found[0].value == "for Orin (sm_87), TensorRT 10.3.0"
    assert exit_code(found) == 69


@pytest.mark.parametrize(
    ("backend", "gpus", "state"),
    [("auto", 0, "note"), ("onnxruntime", 1, "note"), ("auto", 1, "bad"), ("tensorrt", 0, "bad")],
)
def test_engines_without_what_runs_them(backend: Backend, gpus: int, state: str, bundle: Bundle) -> None:
    (one,) = engines(bundle, Seen(gpus=gpus, refused="TensorRT is not installed"), backend)
    assert one.state == state
    assert ("TensorRT is not installed" in (one.say or "")) == (state == "bad")


def test_a_gpu_without_engines_is_idle(bundle_folder: Path) -> None:
    (one,) = engines(open_bundle(bundle_folder), ORIN_SEEN, "auto")
    assert (one.value, one.state) == ("none", "warning")
    assert f"`python -m export engines {bundle_folder}`" in (one.say or "")


def config(folder: Path, bundle: Path, *sources: str) -> EdgeConfig:
    listed = tuple(CameraConfig(name=f"c{i}", source=source) for i, source in enumerate(sources))
    spool = SpoolConfig(path=folder / "not/yet/spool.db", max_bytes=1 << 20)
    return EdgeConfig(device="box", bundle=bundle, camera=listed, spool=spool, runtime=RuntimeConfig())


def test_a_damaged_bundle_is_bad_and_the_rest_is_told(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / IMAGE).write_bytes(b"other")
    found = by_name(examine(config(tmp_path, bundle_folder, str(tmp_path)), tmp_path, Seen()))
    assert found["bundle"].state == "bad"
    assert "damaged" in (found["bundle"].say or "")
    assert found["disk of the spool"].state == "good"
    assert "camera c0" in found


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    assert disk("disk", tmp_path / "a/b", 1, "it").state == "good"
    found = disk("disk", tmp_path / "a/b", 1 << 60, "the spool")
    assert (found.state, found.say) == ("warning", f"the spool may take {float(1 << 30)} GiB")


# --- cameras ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[int]:
    """The port of somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def nobody() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def test_a_camera_that_answers(server: int, tmp_path: Path) -> None:
    (one,) = cameras([CameraConfig(name="door", source=f"rtsp://me:{SECRET}@127.0.0.1:{server}/{SECRET}")], tmp_path)
    assert one == Finding("camera door", f"rtsp://127.0.0.1:{server}")


def test_a_camera_that_does_not(nobody: int, tmp_path: Path) -> None:
    (one,) = cameras([CameraConfig(name="door", source=f"http://me:{SECRET}@127.0.0.1:{nobody}/x")], tmp_path)
    assert (one.value, one.state) == (f"http://127.0.0.1:{nobody}", "bad")
    assert "Connection refused" in (one.say or "")


def test_whether_somebody_listens_where_the_collector_should(server: int, nobody: int, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost"):
        found = collector(PublishConfig(address=f"tcp://{host}:{server}"))
        assert found == Finding("collector", f"tcp://{host}:{server}")
    for address in (f"tcp://127.0.0.1:{nobody}", f"tcp://[::1]:{nobody}", f"ipc://{tmp_path}/socket"):
        found = collector(PublishConfig(address=address))
        assert (found.value, found.state) == (address, "warning"), "no more: events are kept meanwhile"
        assert (found.say or "").startswith("nobody answers there: ")
    assert "no such name" in (collector(PublishConfig(address="tcp://a..b:1")).say or "")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        assert collector(PublishConfig(address=f"ipc://{tmp_path}/socket")).state == "good"


def test_files_folders_and_devices(tmp_path: Path) -> None:
    tree(tmp_path, {"dev/video0": "", "a.avi": "x", "empty/notes.txt": "", "full/a.png": ""})
    sources = ["0", "7", *(str(tmp_path / name) for name in ("a.avi", "gone.avi", "empty", "full", "a\0b"))]
    answers = reach(sources, tmp_path, 5)
    assert [one.good for one in answers] == [True, False, True, False, False, True, False]
    assert answers[0].shown == "/dev/video0"
    assert answers[3].say == os.strerror(2)
    assert reach([], tmp_path, 5) == []


def test_a_source_that_never_answers_does_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.avi")  # opening it waits for a writer
    start = time.monotonic()
    (one,) = reach([str(tmp_path / "pipe.avi")], tmp_path, 0.2)
    assert time.monotonic() - start < 5
    assert one.say == "no answer in 0.2 s"
    (tmp_path / "pipe.avi").open("wb").close()  # lets the thread go


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://me:{}@127.0.0.1:{}/x",
        "rtsp://{}@127.0.0.1:{}/x",
        "rtsp://me:a/{}@127.0.0.1:{}/x",
        "rtsp://{}/b@127.0.0.1:{}/x",
        "rtsp://me:a#{}@127.0.0.1:{}/x",
        "rtsp://me:a@{}@127.0.0.1:{}/x",
        "rtsp://127.0.0.1:{1}/x?password={0}",
        "ftp://me:{}@127.0.0.1:{}/x",
        "rtsp://[me:{}@127.0.0.1:{}/x",
        "rtsp:/me:{}@127.0.0.1:{}/x",
        "rtsp://:{}@:{}/x",
    ],
)
def test_a_password_is_never_told(
    source: str, nobody: int, bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = examine(config(tmp_path, bundle_folder, source.format(SECRET, nobody)), tmp_path, Seen())
    (camera,) = [one for one in findings if one.name == "camera c0"]
    assert camera.state == "bad"
    show(findings)
    assert SECRET not in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert SECRET not in to_json(findings)


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_json_has_one_shape_and_the_same_text_each_time(tmp_path: Path) -> None:
    findings = examine(None, tree(tmp_path, ORIN_NANO), ORIN_SEEN)
    text = to_json(findings)
    assert text == to_json(examine(None, tmp_path, ORIN_SEEN))
    told = json.loads(text)
    assert list(told) == ["format", "state", "findings"]
    assert told["format"] == "lookout.doctor/1"
    assert told["state"] == "note"
    assert len(told["findings"]) == len(findings)
    for one in told["findings"]:
        assert list(one) == ["name", "value", "state", "say"]
        assert one["state"] in ("good", "note", "warning", "bad")
        assert isinstance(one["name"], str)
        assert isinstance(one["value"], str)
        assert one["say"] is None or isinstance(one["say"], str)


@pytest.mark.parametrize(
    ("states", "code", "worst"),
    [
        ([], 0, "good"),
        (["good"], 0, "good"),
        (["good", "warning", "note"], 0, "warning"),
        (["bad", "good"], 69, "bad"),
    ],
)
def test_the_worst_counts(states: list[probes.State], code: int, worst: str) -> None:
    findings = [Finding("a", "b", state) for state in states]
    assert exit_code(findings) == code
    assert json.loads(to_json(findings))["state"] == worst


def test_the_table_cuts_no_command_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show([Finding("camera", "good", "bad", "see"), Finding("engines", "none", "bad", "-" * 60)])
    out = capsys.readouterr().out
    assert out.count("-") == 60
    assert "…" not in out


def test_the_table_shows_any_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show([Finding("camera [red]x[/red]", "[/]", "bad", "do [this]")])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "[/]" in out
    assert "do [this]" in out
