"""The typed fp16 graphs beside the fp32 ones, by the gate's own rules: the mini's real weights, and full size.

Each is looked at twice: as ONNX Runtime runs it, and as a GPU rounds it (tests/rounding.py), which ONNX Runtime's CPU
kernels do not: overflow shows there alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from edge.bundle import DetectorFacts, EncoderFacts
from edge.errors import BundleError
from edge.golden import Golden
from edge.images import read_image
from edge.ort import OrtSession
from edge.values import Image
from export.checkpoint import read_checkpoint
from export.clip import onnx_from_clip
from export.darknet import onnx_from_darknet
from export.hold import RUNGS, held_in_fp32
from export.prompts import bank_from_prompts, prompt_tokens, read_prompts
from export.tokenizer import Tokenizer
from export.verify import (
    detector_answers,
    encoder_answers,
    gate_crops,
    gate_detector,
    gate_encoder,
    gate_frames,
    golden_from_picture,
)
from tests.clip_states import State
from tests.darknet_nets import write_weights, yolov4
from tests.rounding import rounded
from tests.trained_like import clip_state, louder, trained_like, with_naive_norms, words_for

MINI = Path("export/mini")
END = 65504.0  # of float16

How = Callable[[onnx.ModelProto], onnx.ModelProto]


def as_it_is(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


both = pytest.mark.parametrize("how", [as_it_is, rounded])


class Half(OrtSession):
    """On ONNX Runtime, and judged as fp16."""

    precision = "fp16"

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model.SerializeToString())


def largest(model: onnx.ModelProto, part: Callable[[str], bool], image: Image) -> float:
    """The largest magnitude that a node of these names gives."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    names = [node.name for node in model.graph.node if part(node.name)]
    assert names
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with OrtSession(onnx.shape_inference.infer_shapes(wide).SerializeToString()) as session:
        outputs = session.run({"image": image})
    return max(float(np.abs(outputs[name]).max()) for name in names)


def is_stream(name: str) -> bool:
    return name.endswith("/residual") or name == "image/ln_pre"


def is_branch(name: str) -> bool:
    return name.endswith(("attention/out", "attention/out/biased", "mlp/down", "mlp/down/biased"))


# ---- the mini: real weights, real people, the words it ships with ----


class Mini:
    """Golden inputs, and what the fp32 graphs say of the gate's pictures."""

    def __init__(self) -> None:
        self.state: State = dict(read_checkpoint(MINI / "clip-mini.safetensors"))
        graphs = onnx_from_clip(self.state)
        self.image, self.scale = graphs.image, graphs.logit_scale
        self.detectors = [
            onnx_from_darknet(
                MINI / "yolov4-mini.cfg", MINI / "yolov4-mini.weights", precision=precision, bn_epsilon=1e-6
            )
            for precision in ("fp32", "fp16")
        ]
        places = DetectorFacts(
            height=416, width=416, resize="stretch", classes=("person",), anchors=10647, bn_epsilon=1e-6
        )
        looks = EncoderFacts(size=128, dim=128, square="pad", fill_bgr=(104, 117, 123), logit_scale=self.scale)
        with (
            OrtSession(self.detectors[0].SerializeToString()) as detector,
            OrtSession(self.image.SerializeToString()) as encoder,
            OrtSession(graphs.text.SerializeToString()) as text,
        ):
            picture = read_image(MINI / "pets-650.jpg")
            self.golden: Golden = golden_from_picture(picture, detector, places, encoder, looks)
            self.crops, frames = gate_crops(self.golden), gate_frames(self.golden)
            self.vectors = encoder_answers(encoder, self.crops)
            self.seen = detector_answers(detector, frames)
            path = Path("prompts/person-mini.toml")
            prompts = read_prompts(path)
            tokens = prompt_tokens(path, prompts, Tokenizer(MINI / "bpe_simple_vocab_16e6.txt.gz"))
            self.bank = bank_from_prompts(
                path.name, prompts, tokens, text, looks.square, text_sha256="", image_sha256=""
            )

    def judged(self, model: onnx.ModelProto, every: int = 1, sizes: tuple[int, ...] = (8,)) -> str:
        with Half(model) as session:
            return gate_encoder(
                session, self.vectors[::every], self.crops[::every], self.bank, self.scale, sizes, "image"
            )


@pytest.fixture(scope="module")
def mini() -> Mini:
    return Mini()


@both
def test_mini_encoder(mini: Mini, how: How) -> None:
    figures = mini.judged(how(onnx_from_clip(mini.state, precision="fp16").image), sizes=(1, 8, 32))
    decisions = len(mini.crops) * len(mini.bank.categories)
    assert decisions > 800
    assert f"of {decisions} decisions" in figures


@both
def test_mini_detector(mini: Mini, how: How) -> None:
    with Half(how(mini.detectors[1])) as session:
        figures = gate_detector(session, mini.seen, (1, 4), "detector")
    assert int(figures.split(" boxes")[0].split()[-1]) > 100


@pytest.mark.parametrize("rung", RUNGS)
def test_mini_held(mini: Mini, rung: str) -> None:
    held = held_in_fp32(onnx_from_clip(mini.state, precision="fp16").image, RUNGS[rung])
    mini.judged(rounded(held), every=5)


# ---- louder: the same network, its residual stream as large as float16 can and cannot hold ----


def loud(mini: Mini, height: float, part: Callable[[str], bool]) -> State:
    """The mini with that part's largest activation at `height`."""
    return louder(mini.state, height / largest(mini.image, part, mini.crops[::5]))


@pytest.mark.parametrize("height", [1_000.0, 20_000.0, 60_000.0])
def test_a_stream_whose_squares_overflow_is_right_with_our_norms_alone(mini: Mini, height: float) -> None:
    """256 squared is 65536: a LayerNorm written out in float16 sees an infinite variance, and forgets the picture."""
    state = loud(mini, height, is_stream)
    mini.judged(onnx_from_clip(state).image, every=5)  # in fp32 nothing changed
    typed = onnx_from_clip(state, precision="fp16").image
    mini.judged(typed, every=5)
    mini.judged(rounded(typed), every=5)
    naive = rounded(with_naive_norms(typed))
    with Half(naive) as session:
        assert not np.isfinite(session.run({"image": mini.crops[:4]})["variance"]).all()
    with pytest.raises(BundleError, match=r"embedding of crop \d+|best option"):
        mini.judged(naive, every=5)


def test_the_naive_norm_is_right_where_nothing_overflows(mini: Mini) -> None:
    """So it is the overflow that the test before this one sees."""
    mini.judged(rounded(with_naive_norms(onnx_from_clip(mini.state, precision="fp16").image)), every=5)


LADDER: list[tuple[str, Callable[[Mini], State], str]] = [
    ("stream", lambda mini: loud(mini, 1.1 * END, is_stream), "norms"),
    ("branch", lambda mini: loud(mini, 1.2 * END, is_branch), "blocks"),
    ("logits", lambda mini: with_high_logits(mini.state), "attention"),
]


def with_high_logits(state: State) -> State:
    """A key of the first head gets a part that is the same for every token: all its logits rise by 80,000 alike.

    The softmax takes that away again, and in float32 it can. What the key said there before is lost in any precision.
    """
    changed = dict(state)
    weight, bias = (f"visual.transformer.resblocks.1.attn.in_proj_{part}" for part in ("weight", "bias"))
    width = len(state[bias]) // 3
    changed[weight], changed[bias] = (state[key].astype(np.float32) for key in (weight, bias))
    changed[weight][[0, width]] = 0
    changed[bias][[0, width]] = 800
    return changed


@pytest.mark.parametrize(("change", "mends"), [case[1:] for case in LADDER], ids=[case[0] for case in LADDER])
def test_beyond_float16_is_refused_until_the_right_rung(
    mini: Mini, change: Callable[[Mini], State], mends: str
) -> None:
    state = change(mini)
    crops = mini.crops[::5]
    with OrtSession(onnx_from_clip(state).image.SerializeToString()) as session:
        wanted = encoder_answers(session, crops)
    typed = onnx_from_clip(state, precision="fp16").image
    passed, refused = [], []
    for rung, model in {"": typed, **{rung: held_in_fp32(typed, names) for rung, names in RUNGS.items()}}.items():
        try:
            with Half(rounded(model)) as session:
                gate_encoder(session, wanted, crops, mini.bank, mini.scale, (8,), "image")
            passed.append(rung)
        except BundleError as error:
            refused.append(str(error))
    rungs = list(RUNGS)
    assert passed == rungs[rungs.index(mends) :]
    assert all("got nan" in line for line in refused), refused


# ---- full size, with weights whose figures are a trained network's ----


def test_vit_b32_with_massive_activations(mini: Mini) -> None:
    crops = np.stack([cv2.resize(crop, (224, 224), interpolation=cv2.INTER_CUBIC) for crop in mini.crops[::16]])
    state = clip_state()
    plain = onnx_from_clip(state).image
    assert 256 < largest(plain, is_stream, crops[:2]) < END
    with OrtSession(plain.SerializeToString()) as session:
        wanted = encoder_answers(session, crops)
    del plain
    bank = words_for(wanted)

    def judged(model: onnx.ModelProto) -> float:
        """The smallest cosine."""
        with Half(model) as session:
            figures = gate_encoder(session, wanted, crops, bank, 100.0, (8,), "image")
            return float(figures.split("cosine ")[1].split(",")[0])

    typed = onnx_from_clip(state, precision="fp16").image
    before = judged(rounded(typed))
    assert judged(rounded(held_in_fp32(typed, RUNGS["norms"]))) >= before
    with pytest.raises(BundleError, match=r"embedding of crop \d+|best option"):
        judged(rounded(with_naive_norms(typed)))
    del typed
    judged(rounded(onnx_from_clip(louder(state, 150), precision="fp16").image))  # the massive ones at 60,000


def test_yolov4_416_with_loud_channels(mini: Mini, tmp_path: Path) -> None:
    cfg, weights = tmp_path / "yolov4.cfg", tmp_path / "yolov4.weights"
    cfg.write_text(yolov4(416, 416))
    trained_like(cfg, write_weights(cfg, weights), loud=100)
    plain = onnx_from_darknet(cfg, weights)
    assert 256 < largest(plain, lambda name: name.endswith("_convolutional"), mini.seen.frames[:1]) < END
    with OrtSession(plain.SerializeToString()) as session:
        seen = detector_answers(session, mini.seen.frames[:2])
    del plain
    typed = onnx_from_darknet(cfg, weights, precision="fp16")
    for model in (typed, rounded(typed)):
        with Half(model) as session:
            figures = gate_detector(session, seen, (1,), "detector")
        assert int(figures.split(" boxes")[0].split()[-1]) > 100
