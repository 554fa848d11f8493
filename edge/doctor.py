"""`edge doctor`: what is here, which combinations known to go wrong apply, and what to do about it.

A probe that fails is a finding too, and what cannot be told is "unknown". Those of the machine are in edge/probes.py.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from edge import gstreamer, jetson, probes
from edge.bundle import Bundle, open_bundle
from edge.clock import kernel_clock
from edge.config import CameraConfig, EdgeConfig, PublishConfig
from edge.errors import BackendError, BundleError, LookoutError
from edge.jetson import version
from edge.pairs import KNOWN_BAD, Versions, known_bad
from edge.probes import UNKNOWN, Finding, Seen, State, gib
from edge.reach import Reached, reach, reach_collector
from edge.values import Backend

FORMAT = "lookout.doctor/1"
ENGINES = 1 << 30  # what a bundle grows by for one kind of machine, and room to write it beside the old one; estimated


def look() -> Seen:
    """Ask this machine. Raises nothing; loading TensorRT and opening the GPU takes a second or two."""
    facts: dict[str, object] = {
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "apart": sys.prefix != sys.base_prefix and _kept_apart(Path(sys.prefix)),
        "synchronised": kernel_clock(),
        "off_chip": gstreamer.off_chip(),
    }
    module = None
    try:
        from edge import trt

        module = trt.load()
        facts["tensorrt"] = str(module.__version__)
    except Exception as error:  # whatever a broken installation raises
        facts["refused"] = _in_words(error)
    try:
        from edge.cuda import gpu_count, open_cuda

        facts["gpus"] = gpu_count()
        if facts["gpus"]:
            with closing(open_cuda()) as cuda:
                gpu = cuda.gpu
                facts |= {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "memory": gpu.memory}
                facts |= {"binding": cuda.about, "cuda": cuda.driver}
                if module is not None:
                    facts["here"] = trt.platform(module, gpu)
    except Exception as error:
        facts["refused"] = _in_words(error)
    return Seen(**facts)  # type: ignore[arg-type]


def _kept_apart(environment: Path) -> bool:
    return "include-system-site-packages = true" not in (jetson.read(environment / "pyvenv.cfg") or "").lower()


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, LookoutError) else " ".join(f"{type(error).__name__}: {error}".split())


# --- what the configuration names -------------------------------------------------------------------------------------


def disk(name: str, path: Path, wanted: int, for_what: str) -> Finding:
    """Free space where `path` lies, or will lie. wanted: bytes."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        return Finding(name, f"{gib(free)} free", "warning", f"{for_what} may take {gib(wanted)}")
    return Finding(name, f"{gib(free)} free")


def disks(config: EdgeConfig) -> list[Finding]:
    spool = config.spool
    return [
        disk("disk of the bundle", config.bundle, ENGINES, "new engines"),
        disk("disk of the spool", spool.path, spool.max_bytes, "the spool"),
    ]


def bundles(config: EdgeConfig, seen: Seen) -> list[Finding]:
    """The bundle, and its engines where it opens."""
    try:
        bundle = open_bundle(config.bundle)
    except BundleError as error:
        return [Finding("bundle", str(config.bundle), "bad", str(error))]
    facts = bundle.manifest
    return [
        Finding("bundle", f"{facts.name}, made by {facts.made_by}"),
        *engines(bundle, seen, config.runtime.backend),
    ]


def engines(bundle: Bundle, seen: Seen, backend: Backend) -> list[Finding]:
    """Whether this machine finds its engines, as edge.backend.open_sessions chooses them."""
    built = bundle.manifest.engines
    kinds = sorted({str(facts.fingerprint.platform) for facts in built.values()})
    value = f"for {' and '.join(kinds)}" if kinds else "none"
    if backend == "onnxruntime" or (backend == "auto" and not seen.gpus):
        return [Finding("engines", value, "note", "ONNX Runtime on the CPU runs the networks")]
    if backend == "auto" and not built:
        say = f"the GPU stays idle: `make export`, or `python -m export engines {bundle.path}`, builds them here"
        return [Finding("engines", value, "warning", say)]
    if seen.here is None:
        why = seen.refused or "TensorRT and a GPU are needed for them, see above"
        return [Finding("engines", value, "bad", why)]
    found = []
    for network in bundle.manifest.networks:
        try:
            name, facts = bundle.engine_for(network, seen.here)
        except BundleError as error:
            found.append(Finding(f"engine of {network}", value, "bad", str(error)))
        else:
            held = f"; in fp32: {', '.join(facts.held)}" if facts.held else ""
            found.append(Finding(f"engine of {network}", f"{name}: {facts.verified}{held}"))
    return found


def cameras(configs: Sequence[CameraConfig], root: Path, timeout: float = 2.0) -> list[Finding]:
    """All of them at once. timeout: seconds."""
    answers = reach([config.source for config in configs], root, timeout)

    def finding(name: str, answer: Reached) -> Finding:
        return Finding(f"camera {name}", answer.shown, "good" if answer.good else "bad", answer.say)

    return [finding(config.name, answer) for config, answer in zip(configs, answers, strict=True)]


def collector(config: PublishConfig, timeout: float = 2.0) -> Finding:
    """No more than a warning: what is seen meanwhile is kept. timeout: seconds."""
    answer = reach_collector(config.address, timeout)
    return Finding("collector", answer.shown, "good" if answer.good else "warning", answer.say)


# --- all of it --------------------------------------------------------------------------------------------------------


def versions(root: Path, seen: Seen) -> Versions:
    binding, _, number = seen.binding.partition(" ")
    return Versions(
        python=version(seen.python),
        tensorrt=version(seen.tensorrt),
        packaged=version(jetson.package(root, "python3-libnvinfer")),
        compute_capability=version(seen.compute_capability),
        cuda=version(seen.cuda),
        l4t=version(jetson.l4t(root)),
        toolkits=tuple(version(one) for one in jetson.toolkits(root)),
        binding=binding,
        binding_version=version(number),
    )


def pairs(root: Path, seen: Seen) -> list[Finding]:
    here = known_bad(versions(root, seen))
    if not here:
        return [Finding("known to go wrong", f"none of {len(KNOWN_BAD)} known combinations is here")]
    return [Finding("known to go wrong", one.name, one.state, f"{one.say} ({one.source})") for one in here]


def examine(config: EdgeConfig | None, root: Path = Path("/"), seen: Seen | None = None) -> list[Finding]:
    """Everything, in the order in which it is told. Takes a few seconds, and raises nothing.

    config: None leaves out bundle, disk, cameras and collector. seen: what the libraries tell; None asks them.
    """
    facts = look() if seen is None else seen
    return list(_examined(config, root, facts))


def _examined(config: EdgeConfig | None, root: Path, seen: Seen) -> Iterator[Finding]:
    yield from _told("machine", lambda: probes.machine(root, seen))
    yield from _told("JetPack", lambda: probes.jetpack(root))
    yield from _told("NVIDIA driver", lambda: probes.driver(root, seen))
    yield from _told("GPU", lambda: probes.gpu(root, seen))
    yield from _told("TensorRT", lambda: probes.tensorrt(root, seen))
    yield from _told("Python", lambda: probes.python(root, seen))
    yield from _told("video decoding", lambda: probes.decoding(root, seen))
    yield from _told("power mode", lambda: probes.power(root))
    yield from _told("GPU clock", lambda: probes.clocks(root))
    yield from _told("temperature", lambda: probes.temperature(root))
    yield from _told("memory", lambda: probes.memory(root))
    yield from _told("clock", lambda: probes.clock(root, seen))
    if config is not None:
        yield from _told("bundle", lambda: bundles(config, seen))
        yield from _told("disk", lambda: disks(config))
        yield from _told("cameras", lambda: cameras(config.camera, root))
        yield from _told("collector", lambda: collector(config.publish))
    yield from _told("known to go wrong", lambda: pairs(root, seen))


def _told(name: str, probe: Callable[[], Finding | list[Finding] | None]) -> list[Finding]:
    try:
        found = probe()
    except Exception as error:
        return [Finding(name, UNKNOWN, "warning", f"this could not be looked at: {_in_words(error)}")]
    return [] if found is None else found if isinstance(found, list) else [found]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where nothing is bad, else BackendError's."""
    return BackendError.exit_code if any(one.state == "bad" for one in findings) else os.EX_OK


def to_json(findings: Sequence[Finding]) -> str:
    """One object: format, the worst state, and the findings in their order."""
    order: list[State] = ["good", "note", "warning", "bad"]
    worst = max((order.index(one.state) for one in findings), default=0)
    fields = {"format": FORMAT, "state": order[worst], "findings": [asdict(one) for one in findings]}
    return json.dumps(fields, ensure_ascii=False, indent=2)


def show(findings: Sequence[Finding]) -> None:
    """A table for people, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours: dict[State, str] = {"good": "green", "note": "", "warning": "yellow", "bad": "bold red"}
    table = Table("", "what")
    for heading in ("is", "what to do"):
        table.add_column(heading, overflow="fold")  # half a command is none
    for one in findings:
        cells = (Text(one.state, colours[one.state]), Text(one.name), Text(one.value), Text(one.say or ""))
        table.add_row(*cells)
    Console().print(table)
