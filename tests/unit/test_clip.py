"""Both towers against three oracles: the mini's reference from torch, numpy in float64, and torch at full size."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from edge.bundle import Precision
from edge.errors import ModelError
from export.checkpoint import read_checkpoint
from export.clip import ClipGraphs, onnx_from_clip
from export.clip_names import openai_state
from tests import clip_states as files

MINI = Path("export/mini/clip-mini.safetensors")
REFERENCE = Path("tests/golden/clip-mini.reference.npz")
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
LEAST: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999}  # cosine

both = pytest.mark.parametrize("precision", get_args(Precision))


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that fp16 runs slowly on a CPU
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    embedding = session.run(["embedding"], inputs)[0]
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    return embedding


def run_by_the_letter(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    """As `run`, node by node in numpy: ONNX Runtime's CPU kernels round to float16 less often than a GPU's."""
    return ReferenceEvaluator(model).run(["embedding"], inputs)[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest of the rows'."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def pixels(n: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """(n, size, size, 3) uint8 BGR: smooth, so that the rows differ, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3)).repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    return np.clip(coarse + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


def phrases(n: int, context: int = 16, vocab: int = 100, seed: int = 0) -> np.ndarray:
    """(n, context) int64: start, one to context - 2 words, end, zeros; start and end are the highest ids."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((n, context), np.int64)
    for row in tokens:
        words = rng.integers(1, context - 1)
        row[: words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
    return tokens


# --- the numpy oracle -------------------------------------------------------------------------------------------------


class Oracle:
    """CLIP as the paper and its pseudocode have it, in float64, one sequence and one head at a time.

    `highest` is the largest activation met on the residual stream.
    """

    def __init__(self, state: files.State) -> None:
        self.w = {key: value.astype(np.float64) for key, value in state.items()}
        self.highest = 0.0

    def norm(self, x: np.ndarray, key: str) -> np.ndarray:
        self.highest = max(self.highest, float(np.abs(x).max()))
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return normal * self.w[f"{key}.weight"] + self.w[f"{key}.bias"]

    def blocks(self, x: np.ndarray, tower: str, causal: bool) -> np.ndarray:
        """(t, w) -> (t, w)"""
        tokens, width = x.shape
        layers = {key.split(".resblocks.")[1].split(".")[0] for key in self.w if key.startswith(f"{tower}transformer")}
        for key in (f"{tower}transformer.resblocks.{layer}" for layer in range(len(layers))):
            packed = self.norm(x, f"{key}.ln_1") @ self.w[f"{key}.attn.in_proj_weight"].T
            q, k, v = np.split(packed + self.w[f"{key}.attn.in_proj_bias"], 3, axis=1)
            mixed = np.empty_like(x)
            for head in (slice(at, at + 64) for at in range(0, width, 64)):
                logits = q[:, head] @ k[:, head].T / 8
                if causal:
                    logits[np.triu_indices(tokens, 1)] = -np.inf
                weights = np.exp(logits - logits.max(1, keepdims=True))
                mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
            x = x + mixed @ self.w[f"{key}.attn.out_proj.weight"].T + self.w[f"{key}.attn.out_proj.bias"]
            y = self.norm(x, f"{key}.ln_2") @ self.w[f"{key}.mlp.c_fc.weight"].T + self.w[f"{key}.mlp.c_fc.bias"]
            y = y / (1 + np.exp(-1.702 * y))
            x = x + y @ self.w[f"{key}.mlp.c_proj.weight"].T + self.w[f"{key}.mlp.c_proj.bias"]
        return x

    def image(self, bgr: np.ndarray) -> np.ndarray:
        """(n, S, S, 3) uint8 -> (n, d)"""
        kernel = self.w["visual.conv1.weight"]
        patch = kernel.shape[2]
        rows = []
        for rgb in (bgr[..., ::-1] / 255 - MEAN) / STD:
            x = [self.w["visual.class_embedding"]]
            for top in range(0, len(rgb), patch):
                for left in range(0, len(rgb), patch):
                    x.append(np.einsum("wcyx,yxc->w", kernel, rgb[top : top + patch, left : left + patch]))
            x = self.norm(np.stack(x) + self.w["visual.positional_embedding"], "visual.ln_pre")
            x = self.blocks(x, "visual.", causal=False)
            rows.append(self.norm(x[0], "visual.ln_post") @ self.w["visual.proj"])
        return np.stack(rows)

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """(n, t) int64 -> (n, d)"""
        rows = []
        for row in tokens:
            x = self.blocks(self.w["token_embedding.weight"][row] + self.w["positional_embedding"], "", causal=True)
            rows.append(self.norm(x, "ln_final")[row.argmax()] @ self.w["text_projection"])
        return np.stack(rows)


SHAPES: list[dict[str, int]] = [
    {},
    {"patch": 32, "width": 64, "layers": 1, "text_width": 128, "text_layers": 1, "dim": 64},
    {"image_size": 48, "layers": 3, "text_layers": 3, "dim": 128, "context": 77},
]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=["2 layers", "1 layer", "3 layers"])
def test_numpy_agrees(precision: Precision, shape: dict[str, int]) -> None:
    state = files.random_state(3, **shape)
    graphs = onnx_from_clip(state, precision=precision)
    image, tokens = pixels(3, graphs.image_size), phrases(5, graphs.context)
    assert cosine(run(graphs.image, image=image), Oracle(state).image(image)) >= LEAST[precision]
    assert cosine(run(graphs.text, tokens=tokens), Oracle(state).text(tokens)) >= LEAST[precision]


def test_numpy_agrees_to_rounding() -> None:
    state = files.random_state()
    graphs = onnx_from_clip(state)
    for got, expected in (
        (run(graphs.image, image=pixels(4)), Oracle(state).image(pixels(4))),
        (run(graphs.text, tokens=phrases(4)), Oracle(state).text(phrases(4))),
    ):
        np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


@both
@pytest.mark.parametrize("run", [run, run_by_the_letter], ids=["onnxruntime", "numpy"])
def test_activations_whose_squares_overflow_float16(precision: Precision, run: Callable[..., np.ndarray]) -> None:
    """Trained ViTs have such outliers; a LayerNorm that sums squares in float16 makes them infinite."""
    state = files.random_state(5)
    state["visual.ln_pre.weight"] = 1000 * state["visual.ln_pre.weight"]
    state["token_embedding.weight"] = 4000 * state["token_embedding.weight"]
    graphs = onnx_from_clip(state, precision=precision)
    image, text = Oracle(state), Oracle(state)
    assert cosine(run(graphs.image, image=pixels(2)), image.image(pixels(2))) >= LEAST[precision]
    assert cosine(run(graphs.text, tokens=phrases(4)), text.text(phrases(4))) >= LEAST[precision]
    for highest in (image.highest, text.highest):
        assert highest < 65504 < highest**2


# --- the mini ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=get_args(Precision))
def mini(request: pytest.FixtureRequest) -> tuple[ClipGraphs, float]:
    return onnx_from_clip(read_checkpoint(MINI), precision=request.param), LEAST[request.param]


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    with np.load(REFERENCE) as file:
        yield file


def test_mini_facts(mini: tuple[ClipGraphs, float]) -> None:
    graphs, _ = mini
    facts = (graphs.image_size, graphs.embedding_dim, graphs.context, graphs.vocab)
    assert facts == (128, 128, 77, 49408)
    assert graphs.logit_scale == pytest.approx(13.858603, abs=1e-5)


def test_mini_image(mini: tuple[ClipGraphs, float], reference: Any) -> None:
    graphs, least = mini
    rgb, network_input = reference["image_u8"], reference["image_input"]
    np.testing.assert_allclose(((rgb / 255 - MEAN) / STD).transpose(0, 3, 1, 2), network_input, atol=1e-5)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    assert cosine(run(graphs.image, image=bgr), reference["image_embedding"]) >= least
    assert cosine(run(graphs.image, image=rgb), reference["image_embedding"]) < 0.999  # the order is seen
    tall = np.ascontiguousarray(reference["tall_letterboxed_u8"][None, ..., ::-1])
    assert cosine(run(graphs.image, image=tall), reference["tall_embedding"]) >= least


def test_mini_text_and_logits(mini: tuple[ClipGraphs, float], reference: Any) -> None:
    graphs, least = mini
    text = run(graphs.text, tokens=reference["token_ids"].astype(np.int64))
    assert cosine(text, reference["text_embedding"]) >= least
    image = run(graphs.image, image=np.ascontiguousarray(reference["image_u8"][..., ::-1]))
    np.testing.assert_allclose(graphs.logit_scale * image @ text.T, reference["logits"], atol=0.01)


# --- the graphs' form -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n", [1, 2, 9])
def test_any_batch(precision: Precision, n: int) -> None:
    graphs = onnx_from_clip(files.random_state(), precision=precision)
    image, tokens = pixels(9)[:n], phrases(9)[:n]
    alone = np.concatenate([run(graphs.image, image=row[None]) for row in image])
    np.testing.assert_allclose(run(graphs.image, image=image), alone, atol=2e-3 if precision == "fp16" else 1e-5)
    alone = np.concatenate([run(graphs.text, tokens=row[None]) for row in tokens])
    np.testing.assert_allclose(run(graphs.text, tokens=tokens), alone, atol=2e-3 if precision == "fp16" else 1e-5)


def test_words_after_the_end_are_not_seen() -> None:
    graphs = onnx_from_clip(files.random_state())
    tokens = phrases(1)
    tokens[0, 6:] = 0
    tokens[0, 5] = 99
    longer = tokens.copy()
    longer[0, 6:] = 7
    np.testing.assert_allclose(run(graphs.text, tokens=tokens), run(graphs.text, tokens=longer), atol=1e-6)


@both
def test_signature(precision: Precision) -> None:
    graphs = onnx_from_clip(files.random_state(), precision=precision)
    for model, name, kind, shape in (
        (graphs.image, "image", TensorProto.UINT8, ["n", 64, 64, 3]),
        (graphs.text, "tokens", TensorProto.INT64, ["n", 16]),
    ):
        assert model.ir_version == 8
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
        ends = [*model.graph.input, *model.graph.output]
        assert [end.name for end in ends] == [name, "embedding"]
        assert [end.type.tensor_type.elem_type for end in ends] == [kind, TensorProto.FLOAT]
        shapes = [[d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim] for end in ends]
        assert shapes == [shape, ["n", 32]]


def test_names_tell_the_layer() -> None:
    graphs = onnx_from_clip(files.random_state(), precision="fp16")
    for model, tower in ((graphs.image, "image"), (graphs.text, "text")):
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert all(name.startswith(f"{tower}/") or name == "embedding" for name in names)
        for block in range(2):
            for part in ("ln_1", "attention/query", "attention/logits", "attention/softmax", "attention/out", "mlp/up"):
                assert f"{tower}/block{block}/{part}" in names
        assert all(list(node.output) == [node.name] for node in model.graph.node)


@both
def test_types_are_strong(precision: Precision) -> None:
    """Every node's floats are of one type, and of the right one; TensorRT's strongly typed networks refuse others."""
    graphs = onnx_from_clip(files.random_state(), precision=precision)
    work = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    for model in (graphs.image, graphs.text):
        graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        products: Counter[int] = Counter()
        for node in graph.node:
            used = {types[name] for name in (*node.input, *node.output)} & floats
            if node.op_type == "Cast":
                continue
            assert len(used) <= 1, node.name
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2", "Div"):
                assert used == {TensorProto.FLOAT}, node.name
            if node.op_type in ("MatMul", "Conv"):
                products.update(used)
        if precision == "fp16":
            assert products[TensorProto.FLOAT] == 1  # the projection, of one row
        assert products[work] > 10
    casts = Counter(node.op_type for node in (*graphs.image.graph.node, *graphs.text.graph.node))["Cast"]
    assert casts == 1 if precision == "fp32" else casts > 1


def test_layer_norm_is_one_node() -> None:
    graphs = onnx_from_clip(files.random_state())
    kinds = Counter(node.op_type for node in graphs.image.graph.node)
    assert kinds["LayerNormalization"] == 2 * 2 + 2
    assert not kinds.keys() & {"ReduceMean", "Pow", "Sqrt", "Shape", "Expand"}


def test_either_naming_and_dtype_gives_the_same_graph() -> None:
    state = files.random_state(dtype=np.float16)
    for value in state.values():
        value.flags.writeable = False  # inputs are never modified
    expected = onnx_from_clip(state)
    assert onnx_from_clip(files.hugging_face(state)) == expected
    assert onnx_from_clip({key: value.astype(np.float64) for key, value in state.items()}) == expected


# --- errors -----------------------------------------------------------------------------------------------------------


def test_weights_outside_float16() -> None:
    state = files.random_state()
    state["visual.transformer.resblocks.1.mlp.c_fc.bias"][3] = 7e4
    onnx_from_clip(state)
    with pytest.raises(ModelError, match=r"image/block1/mlp/up/bias is outside the range of float16; .*fp32"):
        onnx_from_clip(state, precision="fp16")


def test_incomplete_state() -> None:
    state = files.random_state()
    del state["ln_final.bias"]
    with pytest.raises(ModelError, match=r"'ln_final\.bias' is missing"):
        onnx_from_clip(state)


# --- torch at full size -----------------------------------------------------------------------------------------------


def torch_clip(torch: Any, state: files.State) -> Any:
    """ViT-B/32 of torch's own modules under OpenAI's names; (image (n, 3, S, S), tokens) -> both embeddings."""
    nn = torch.nn

    class Gelu(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x * torch.sigmoid(1.702 * x)

    class Mlp(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.c_fc, self.gelu, self.c_proj = nn.Linear(width, 4 * width), Gelu(), nn.Linear(4 * width, width)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.c_proj(self.gelu(self.c_fc(x)))

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(width, width // 64, batch_first=True), Mlp(width)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x, mask):  # type: ignore[no-untyped-def]
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self, width: int, layers: int) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList([Block(width) for _ in range(layers)])

        def forward(self, x, mask):  # type: ignore[no-untyped-def]
            for block in self.resblocks:
                x = block(x, mask)
            return x

    class Visual(nn.Module):
        def __init__(self, size: int, patch: int, width: int, layers: int, dim: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
            self.class_embedding = nn.Parameter(torch.zeros(width))
            self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
            self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            self.transformer = Transformer(width, layers)
            self.proj = nn.Parameter(torch.zeros(width, dim))

        def forward(self, x):  # type: ignore[no-untyped-def]
            x = self.conv1(x).flatten(2).transpose(1, 2)
            first = self.class_embedding.expand(x.shape[0], 1, -1)
            x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
            mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
            return self.ln_post(self.transformer(x, mask)[:, 0]) @ self.proj

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = Visual(224, 32, 768, 12, 512)
            self.token_embedding = nn.Embedding(49408, 512)
            self.positional_embedding = nn.Parameter(torch.zeros(77, 512))
            self.transformer = Transformer(512, 12)
            self.ln_final = nn.LayerNorm(512)
            self.text_projection = nn.Parameter(torch.zeros(512, 512))
            self.logit_scale = nn.Parameter(torch.zeros([]))

        def forward(self, image, tokens):  # type: ignore[no-untyped-def]
            x = self.token_embedding(tokens) + self.positional_embedding
            mask = torch.full([77, 77], float("-inf"), dtype=x.dtype).triu(1)
            x = self.ln_final(self.transformer(x, mask))
            x = x[torch.arange(x.shape[0]), tokens.argmax(1)] @ self.text_projection
            return self.visual(image), x

    with torch.device("meta"):  # no time spent on weights that are replaced
        model = Clip()
    tensors = {key: torch.nn.Parameter(torch.from_numpy(value)) for key, value in state.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def test_full_size_in_every_format_against_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the reference, and the writer of the files, is torch")
    sizes = {"image_size": 224, "patch": 32, "width": 768, "layers": 12, "dim": 512}
    sizes |= {"text_width": 512, "text_layers": 12, "context": 77, "vocab": 49408}
    state = files.random_state(**sizes, dtype=np.float16)
    model = torch_clip(torch, {key: value.astype(np.float32) for key, value in state.items()})
    image, tokens = pixels(2, 224), phrases(3, 77, 49408)
    rgb = torch.from_numpy(((image[..., ::-1] / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        expected = [embedding.numpy() for embedding in model(rgb, torch.from_numpy(tokens))]

    half = torch_clip(torch, state)
    example = (rgb[:1].half(), torch.from_numpy(tokens[:1]))
    path = tmp_path / "clip"
    for write in (
        lambda: save_file(state, path),
        lambda: save_file({k: np.array(v, order="C") for k, v in files.hugging_face(state).items()}, path),
        lambda: torch.save(half.state_dict(), path),
        lambda: torch.jit.save(torch.jit.trace(half, example, check_trace=False), path),
        lambda: torch.jit.save(torch.jit.script(half), path),
        lambda: path.write_bytes(files.torchscript(state)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # TorchScript is deprecated and warns of what it traces; OpenAI's file is one
            write()
        got = openai_state(read_checkpoint(path))
        path.unlink()
        assert got.keys() == state.keys()
        assert all(got[key].dtype == value.dtype and np.array_equal(got[key], value) for key, value in state.items())

    for precision, least in LEAST.items():
        graphs = onnx_from_clip(got, precision=precision)
        assert cosine(run(graphs.image, image=image), expected[0]) >= least
        assert cosine(run(graphs.text, tokens=tokens), expected[1]) >= least
