"""A bundle's TensorRT engines for the machine at hand: built, held against ONNX Runtime, packed where they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from edge.backend import Session, open_session
from edge.bundle import (
    DETECTOR,
    GOLDEN,
    HALF,
    IMAGE,
    SMALLER,
    TIMING,
    Bundle,
    EngineFacts,
    EnginePlan,
    Fingerprint,
    Network,
    Platform,
    open_bundle,
    sha256_of,
)
from edge.errors import BackendError, BundleError
from edge.golden import Golden
from export.engine import Build, Progress, engine_from_onnx, strongly_typed
from export.hold import RUNGS, float32_nodes, held_in_fp32
from export.pack import bundle_from_parts, reuse, workplace
from export.verify import (
    detector_answers,
    encoder_answers,
    gate_crops,
    gate_detector,
    gate_encoder,
    gate_frames,
)

if TYPE_CHECKING:
    from edge.cuda import Cuda

Say = Callable[[str, str], None]  # (step, what became of it)


def build_engines(target: Path, say: Say, progress: Progress) -> Bundle:
    """Give the bundle at `target` the engines that this machine lacks, or whose answers are no longer right.

    Raises BundleError: no bundle, no graphs to build from, or an engine that answers otherwise than ONNX Runtime (it is
    not packed); ModelError: a graph that TensorRT cannot read; BackendError: no TensorRT, no GPU, or a build that
    failed; ConfigError: another export is at work. `target` then is as it was.
    """
    from edge import trt
    from edge.cuda import NO_DRIVER, gpu_count, open_cuda

    if not gpu_count():
        raise BackendError("engines are built on the machine that runs them: no NVIDIA GPU here", remedy=NO_DRIVER)
    module = trt.load()
    with workplace(target) as folder, closing(open_cuda()) as cuda:
        bundle = open_bundle(target)
        plan, here = bundle.manifest.engine, trt.platform(module, cuda.gpu)
        if plan is None:
            remedy = "give its recipe a part [engine], and build the bundle again"
            raise BundleError(f"{target}: no fp16 graphs to build engines from", remedy=remedy)
        wanted: list[Network] = [
            network
            for network in bundle.manifest.networks
            if not _has(bundle, network, here) or not _serves(bundle, network, here, module, cuda, say)
        ]
        if not wanted:
            say("engines", f"unchanged, for {here}")
            return bundle
        kept = {
            name: facts
            for name, facts in bundle.manifest.engines.items()
            if facts.network not in wanted or facts.fingerprint.platform != here
        }
        dropped = set(bundle.manifest.engines) - set(kept)
        reuse({name: bundle.file(name) for name in bundle.manifest.files if name not in {*dropped, TIMING}}, folder)
        say("engines", f"for {here}: what ONNX Runtime answers is asked first")
        maker = _Maker(bundle, plan, _Gate(bundle), module, cuda, here, say, progress)
        for network in wanted:
            engine, facts = maker.engine(network)
            name = f"{network.removesuffix('.onnx')}-{facts.fingerprint.short()}.engine"
            (folder / name).write_bytes(engine)
            kept[name] = facts
        if maker.timing:
            (folder / TIMING).write_bytes(maker.timing)
        sums = {path.name: sha256_of(path) for path in folder.iterdir()}
        changes = {"files": dict(sorted(sums.items())), "engines": dict(sorted(kept.items()))}
        return bundle_from_parts(folder, bundle.manifest.model_copy(update=changes), bundle.bank, target)


def kept_engines(old: Bundle | None, folder: Path, plan: EnginePlan | None) -> dict[str, EngineFacts]:
    """Take into a new bundle's `folder` those engines of the one before that were built from the graphs it has."""
    if old is None or plan is None:
        return {}
    kept = {
        name: facts
        for name, facts in old.manifest.engines.items()
        if (folder / facts.graph).exists()  # a recipe may give up its smaller size
        and facts.fingerprint.batches == plan.batches(facts.network)
        and facts.fingerprint.onnx_sha256 == sha256_of(folder / facts.graph)
    }
    names = [*kept, *([TIMING] if TIMING in old.manifest.files else [])]
    reuse({name: old.file(name) for name in names}, folder)
    return kept


def no_engines_here() -> str | None:
    """Why this machine builds no engines, in words; None: it does."""
    from edge.cuda import gpu_count

    if not gpu_count():
        return "no NVIDIA GPU here"
    return None if find_spec("tensorrt") else "no TensorRT for Python here"


def check_halves(folder: Path, golden: Golden) -> str:
    """Hold the typed fp16 graphs in `folder` against the golden outputs, on ONNX Runtime -> the figures in one line.

    Raises BundleError for a graph that differs, BackendError.
    """
    told = []
    for network in (DETECTOR, SMALLER) if golden.smaller is not None else (DETECTOR,):
        with open_session(folder / HALF[network]) as detector:
            told.append(golden.check_detector(detector, HALF[network], network=network))
    with open_session(folder / HALF[IMAGE]) as image:
        return f"fp16: {', '.join([*told, golden.check_encoder(image, HALF[IMAGE], 'fp16')])}"


def _has(bundle: Bundle, network: Network, here: Platform) -> bool:
    try:
        bundle.engine_for(network, here)
    except BundleError:
        return False
    return True


def _serves(bundle: Bundle, network: Network, here: Platform, trt: Any, cuda: Cuda, say: Say) -> bool:
    """Whether the engine that is there answers as a box asks it at its start: one that does not is to be built anew."""
    from edge.trt import TrtSession

    name, facts = bundle.engine_for(network, here)
    plan, built, golden = bundle.file(name).read_bytes(), facts.fingerprint, Golden.read(bundle.file(GOLDEN))
    try:
        with TrtSession(plan, cuda, name=name, batches=built.batches, precision=built.precision, trt=trt) as session:
            if network == IMAGE:
                golden.check_encoder(session, name, built.precision)
            else:
                golden.check_detector(session, name, network=network)
    except (BackendError, BundleError) as error:
        say("engines", f"{error.what}: it is built again")
        return False
    return True


class _Gate:
    """What ONNX Runtime answers, asked before TensorRT needs the memory, and an engine has to answer too."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, golden = bundle, Golden.read(bundle.file(GOLDEN))
        self._crops, self._boxes = gate_crops(golden), {}
        for network in bundle.manifest.networks:
            if network != IMAGE:
                with open_session(bundle.file(network)) as detector:
                    self._boxes[network] = detector_answers(detector, gate_frames(golden, network))
        with open_session(bundle.file(IMAGE)) as encoder:
            self._vectors = encoder_answers(encoder, self._crops)

    def check(self, network: Network, session: Session, batches: Sequence[int]) -> str:
        """The figures in one line. Raises BundleError for an engine that answers otherwise."""
        if network != IMAGE:
            return gate_detector(session, self._boxes[network], batches, network)
        bank, scale = self._bundle.bank, self._bundle.manifest.encoder.logit_scale
        return gate_encoder(session, self._vectors, self._crops, bank, scale, batches, network)


class _Maker:
    """Makes one engine after the other on one machine.

    timing: what TensorRT measured in this and earlier builds; it grows as it builds.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: EnginePlan,
        gate: _Gate,
        trt: Any,
        cuda: Cuda,
        here: Platform,
        say: Say,
        progress: Progress,
    ) -> None:
        self._bundle, self._plan, self._gate, self._trt, self._cuda = bundle, plan, gate, trt, cuda
        self._here, self._say, self._progress = here, say, progress
        self.timing = bundle.file(TIMING).read_bytes() if TIMING in bundle.manifest.files else b""

    def engine(self, network: Network) -> tuple[bytes, EngineFacts]:
        """A plan that passed the gate, with its facts: for the encoder as many rungs in fp32 as that took."""
        held: tuple[str, ...] = ()
        while True:
            plan = self._built(network, held)
            try:
                verified = self._verified(network, plan)
            except BundleError as error:
                left = [rung for rung in RUNGS if rung not in held] if network == IMAGE else []
                if not left:
                    raise
                held = (*held, left[0])
                self._say("engines", f"{error.what}: {network} is built again with its {' and '.join(held)} in fp32")
                continue
            graph = HALF[network] if strongly_typed(self._trt) else network
            fingerprint = Fingerprint(
                platform=self._here,
                precision="fp16",
                onnx_sha256=self._bundle.manifest.files[graph],
                batches=self._plan.batches(network),
            )
            self._say("engines", f"{network}: {verified}")
            return plan, EngineFacts(
                network=network, graph=graph, fingerprint=fingerprint, held=held, verified=verified
            )

    def _built(self, network: Network, held: tuple[str, ...]) -> bytes:
        typed = onnx.load(self._bundle.file(HALF[network]))
        if held:
            typed = held_in_fp32(typed, RUNGS[held[-1]])
        if strongly_typed(self._trt):
            graph, floats = typed.SerializeToString(), frozenset[str]()
        else:  # the same types, as what TensorRT must keep to
            whole, typed_names = onnx.load(self._bundle.file(network)), {node.name for node in typed.graph.node}
            graph, floats = whole.SerializeToString(), float32_nodes(typed)
            floats |= {node.name for node in whole.graph.node if node.name not in typed_names}
        build = Build(graph, self._plan.batches(network), self._plan.workspace_mib << 20, floats)
        plan, self.timing = engine_from_onnx(build, self._trt, name=network, timing=self.timing, say=self._progress)
        return plan

    def _verified(self, network: Network, plan: bytes) -> str:
        from edge.trt import TrtSession

        batches = self._plan.batches(network)
        with TrtSession(plan, self._cuda, name=f"engine of {network}", batches=batches, trt=self._trt) as session:
            return self._gate.check(network, session, batches)
