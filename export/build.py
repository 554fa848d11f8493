"""A recipe becomes a bundle: each step in order; those whose inputs did not change are taken from the bundle before."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import onnx

from edge.backend import open_session
from edge.bank import PromptBank
from edge.bundle import (
    DETECTOR,
    GOLDEN,
    HALF,
    IMAGE,
    SMALLER,
    TEXT,
    VOCABULARY,
    Bundle,
    DetectorFacts,
    EncoderFacts,
    EnginePlan,
    Manifest,
    Network,
    Precision,
    open_bundle,
    sha256_of,
)
from edge.errors import BundleError, ModelError
from edge.images import read_image
from export.checkpoint import read_checkpoint
from export.clip import ClipGraphs, onnx_from_clip
from export.darknet import onnx_from_darknet
from export.engines import check_halves, kept_engines
from export.pack import bundle_from_parts, reuse, workplace
from export.prompts import bank_in, prompt_tokens, read_prompts
from export.recipe import DetectorRecipe, EncoderRecipe, Recipe
from export.tokenizer import CONTEXT, END, Tokenizer
from export.verify import PHRASES, golden_from_picture, verify

Say = Callable[[str, str], None]  # (step, what became of it)
_LOGIT_SCALE = "logit_scale"  # the one fact of image.onnx that no shape tells: kept in its metadata


def build(recipe: Recipe, target: Path, say: Say) -> Bundle:
    """Make or renew the bundle at `target`.

    recipe: as `fetched` returns it. say: is told how each step ended. Raises ConfigError, ModelError, CaptureError (the
    golden picture), BundleError (a graph that verify refuses), BackendError; `target` then is as it was.
    """
    d, e = recipe.detector, recipe.encoder
    prompts = read_prompts(recipe.prompts)  # the operator's mistakes come before the long work
    cfg, weights, checkpoint, vocabulary = map(Path, (d.cfg, d.weights, e.checkpoint, e.vocabulary))
    tokenizer = Tokenizer(vocabulary)
    tokens = prompt_tokens(recipe.prompts, prompts, tokenizer)
    picture = read_image(recipe.golden)
    sums = {path: sha256_of(path) for path in (cfg, weights, checkpoint, vocabulary, recipe.golden)}

    @functools.cache
    def clip_graphs(precision: Precision) -> ClipGraphs:
        graphs = onnx_from_clip(read_checkpoint(checkpoint), precision=precision)
        takes = f"{graphs.context} tokens of {graphs.vocab}"
        if takes != (makes := f"{CONTEXT} tokens of {END + 1}"):
            raise ModelError(f"{checkpoint}: the text tower does not fit the vocabulary", expected=makes, got=takes)
        onnx.helper.set_model_props(graphs.image, {_LOGIT_SCALE: repr(graphs.logit_scale)})
        return graphs

    with workplace(target) as folder:
        old = _opened(target, say)
        steps = _Steps(folder, old, say)

        engine = recipe.engine is not None  # then each network is written in fp16, too
        sizes: dict[Network, int] = {DETECTOR: d.size, **({SMALLER: d.smaller} if d.smaller else {})}

        def make_detector(network: Network, size: int) -> str:
            graphs: dict[str, Precision] = {network: "fp32", **({HALF[network]: "fp16"} if engine else {})}
            for file, precision in graphs.items():
                keep = [d.classes.index(name) for name in d.keep]
                graph = onnx_from_darknet(
                    cfg, weights, size=size, keep=keep, precision=precision, bn_epsilon=d.bn_epsilon
                )
                (folder / file).write_bytes(graph.SerializeToString())
            return f"{cfg.name}, {size} px{', also in fp16' if engine else ''}"

        def make_encoder() -> str:
            graphs = clip_graphs("fp32")
            (folder / IMAGE).write_bytes(graphs.image.SerializeToString())
            (folder / TEXT).write_bytes(graphs.text.SerializeToString())
            shutil.copyfile(vocabulary, folder / VOCABULARY)
            if engine:
                (folder / HALF[IMAGE]).write_bytes(clip_graphs("fp16").image.SerializeToString())
            return f"{checkpoint.name}, {graphs.image_size} px{', also in fp16' if engine else ''}"

        darknet = [sums[cfg], sums[weights]]
        written = [d.classes, d.keep, d.bn_epsilon, engine, _code("darknet*.py")]
        towers = [sums[checkpoint], sums[vocabulary], engine, _code("clip*.py", "checkpoint.py", "pickles.py")]
        for network, size in sizes.items():
            name = "smaller" if network == SMALLER else "detector"
            files = [network, *([HALF[network]] if engine else [])]
            steps.run(name, files, [*darknet, size, *written], functools.partial(make_detector, network, size))
        steps.run("encoder", [IMAGE, TEXT, VOCABULARY, *([HALF[IMAGE]] if engine else [])], towers, make_encoder)
        detector_facts, encoder_facts = _detector_facts(folder / DETECTOR, d), _encoder_facts(folder / IMAGE, e)
        smaller_facts = _detector_facts(folder / SMALLER, d) if d.smaller else None

        def make_golden() -> str:
            with (
                open_session(folder / DETECTOR) as detector,
                open_session(folder / SMALLER) if smaller_facts else nullcontext() as smaller,
                open_session(folder / IMAGE) as image,
                open_session(folder / TEXT) as text,
            ):
                fewer = (smaller, smaller_facts) if smaller and smaller_facts else None
                golden = golden_from_picture(picture, detector, detector_facts, image, encoder_facts, fewer)
                phrases = tokenizer.encode(PHRASES)
                words = text.run({"tokens": phrases})["embedding"]
            golden.write(folder / GOLDEN)
            said = verify(folder, golden, phrases, words)
            return said + (f"; {check_halves(folder, golden)}" if engine else "")

        facts = [one.model_dump() for one in (detector_facts, smaller_facts, encoder_facts) if one]
        looks = [f"../edge/{name}.py" for name in ("golden", "detect", "imaging", "placement", "boxes", "images")]
        looked = [sums[recipe.golden], _code("verify.py", "variants.py", "tokenizer.py", *looks)]
        steps.run("verify", [GOLDEN], [*darknet, d.size, *written, *towers, *facts, *looked], make_golden)

        plan = EnginePlan(**recipe.engine.model_dump()) if recipe.engine else None
        engines = kept_engines(old, folder, plan)
        sha256s = {path.name: sha256_of(path) for path in folder.iterdir()}
        words_of = [recipe.prompts.name, prompts.model_dump(), _code("prompts.py", "tokenizer.py")]
        bank = steps.words(
            [*words_of, sha256s[TEXT], sha256s[IMAGE], sha256s[VOCABULARY], encoder_facts.square],
            lambda: bank_in(folder, recipe.prompts.name, prompts, tokens, sha256s, encoder_facts),
        )
        manifest = Manifest(
            name=recipe.name,
            made_by=f"lookout {version('lookout')}",
            detector=detector_facts,
            encoder=encoder_facts,
            smaller=smaller_facts,
            files=dict(sorted(sha256s.items())),
            engine=plan,
            engines=engines,
            steps=steps.keys,
        )
        return bundle_from_parts(folder, manifest, bank, target)


def _opened(target: Path, say: Say) -> Bundle | None:
    if not target.exists():
        return None
    try:
        return open_bundle(target)
    except BundleError as error:
        say("bundle", f"the one before is of no use ({error.what}): every step runs")
        return None


class _Steps:
    """Runs a step, or takes its files from the bundle before where its inputs' key is the same."""

    def __init__(self, folder: Path, old: Bundle | None, say: Say) -> None:
        self._folder, self._old, self._say = folder, old, say
        self.keys: dict[str, str] = {}

    def run(self, name: str, files: Sequence[str], inputs: Sequence[object], make: Callable[[], str]) -> None:
        """make: writes the step's files and says what it made."""
        self.keys[name] = _key(inputs)
        if self._old and self._old.manifest.steps.get(name) == self.keys[name]:
            reuse({file: self._old.file(file) for file in files}, self._folder)
            self._say(name, "unchanged")
            return
        start = time.perf_counter()
        made = make()
        self._say(name, f"{made} ({time.perf_counter() - start:.1f} s)")

    def words(self, inputs: Sequence[object], make: Callable[[], PromptBank]) -> PromptBank:
        """The same for the bank, which `python -m export prompts` may have replaced since.

        What calibrate and adapt made of the same words stays.
        """
        key = _key(inputs)
        if self._old and self._old.manifest.steps.get("prompts") == f"{key} {self._old.bank.words}":
            bank = self._old.bank
            self._say("prompts", "unchanged" + "".join(f", {fit.how} on {fit.labels}" for fit in bank.fits))
        else:
            if self._old and self._old.bank.fits:
                how = " and ".join(fit.how for fit in self._old.bank.fits)
                self._say("prompts", f"the bank before was {how}; these words are others, and are not")
            start = time.perf_counter()
            bank = make()
            said = f"{bank.source}: {len(bank.categories)} categories, {len(bank.vectors)} options"
            self._say("prompts", f"{said} ({time.perf_counter() - start:.1f} s)")
        self.keys["prompts"] = f"{key} {bank.words}"
        return bank


def _detector_facts(graph: Path, recipe: DetectorRecipe) -> DetectorFacts:
    model = onnx.load(graph)
    _, height, width, _ = _dims(model.graph.input[0])
    _, anchors, _ = _dims(model.graph.output[0])
    return DetectorFacts(
        height=height,
        width=width,
        resize=recipe.resize,
        classes=recipe.keep,
        anchors=anchors,
        bn_epsilon=recipe.bn_epsilon,
    )


def _encoder_facts(graph: Path, recipe: EncoderRecipe) -> EncoderFacts:
    model = onnx.load(graph)
    _, size, _, _ = _dims(model.graph.input[0])
    _, dim = _dims(model.graph.output[0])
    red, green, blue = recipe.fill_rgb
    return EncoderFacts(
        size=size,
        dim=dim,
        square=recipe.square,
        fill_bgr=(blue, green, red),
        logit_scale=float({entry.key: entry.value for entry in model.metadata_props}[_LOGIT_SCALE]),
    )


def _dims(tensor: onnx.ValueInfoProto) -> list[int]:
    return [axis.dim_value for axis in tensor.type.tensor_type.shape.dim]


def _key(inputs: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _code(*patterns: str) -> str:
    """sha256 over the source files of export/ that a step runs: a changed exporter is a changed input."""
    here = Path(__file__).parent
    files = sorted(file for pattern in patterns for file in here.glob(pattern))
    return _key([sha256_of(file) for file in files])
