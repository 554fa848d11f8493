"""Every format reads to the same arrays, and every damaged or hostile file is one ModelError and runs nothing."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from edge.errors import ModelError
from export.checkpoint import read_checkpoint
from export.clip_names import openai_state
from tests import clip_states as files

MINI = Path("export/mini/clip-mini.safetensors")
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {"visual.proj": np.arange(6, dtype=np.float32).reshape(2, 3), "logit_scale": np.array(4.5, np.float16)}


def same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return got.keys() == expected.keys() and all(
        got[key].dtype == value.dtype and got[key].shape == value.shape and np.array_equal(got[key], value)
        for key, value in expected.items()
    )


def read(folder: Path, data: bytes) -> dict[str, np.ndarray]:
    path = folder / "checkpoint"
    path.write_bytes(data)
    return read_checkpoint(path)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder, data)
    message = str(caught.value)
    assert message.startswith(str(folder / "checkpoint"))
    assert len(message) < 1000
    return message


# --- what can be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "written",
    [save, files.torch_zip, lambda state: files.torch_zip(state, nested=True)],
    ids=["safetensors", "torch zip", "nested torch zip"],
)
def test_formats(tmp_path: Path, dtype: Any, written: Callable[[dict[str, np.ndarray]], bytes]) -> None:
    state = files.random_state(dtype=dtype)
    assert same(read(tmp_path, written(state)), state)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_torchscript_with_what_it_holds_beside_weights(tmp_path: Path, dtype: Any) -> None:
    state = files.random_state(dtype=dtype)
    got = read(tmp_path, files.torchscript(state))
    assert {key: int(got[key]) for key in got.keys() - state.keys()} == {
        "input_resolution": 224,
        "context_length": 77,
        "vocab_size": 49408,
    }
    assert same(openai_state(got), state)


def test_format_is_told_by_content(tmp_path: Path) -> None:
    state = files.random_state()
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.torch_zip(state))
    assert same(read_checkpoint(path), state)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((3, 4), (4, 1), 0, np.arange(12).reshape(3, 4)),
        ((4, 3), (1, 4), 0, np.arange(12).reshape(3, 4).T),
        ((2, 3), (4, 1), 5, [[5, 6, 7], [9, 10, 11]]),
        ((4,), (3,), 2, [2, 5, 8, 11]),
        ((1, 2), (2**40, 1), 0, [[0, 1]]),  # an axis of one is never stepped along
        ((), (), 11, 11),
        ((2, 2), (0, 1), 0, [[0, 1], [0, 1]]),
    ],
)
def test_views(tmp_path: Path, shape: Any, strides: Any, offset: int, expected: Any) -> None:
    values = np.arange(12, dtype=np.float32)
    pickle = files.program(files.dict_of({"x": files.tensor("0", "Float", 12, shape, strides, offset)}))
    np.testing.assert_array_equal(read(tmp_path, files.archive(pickle, {"0": values.tobytes()}))["x"], expected)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((3, 4), (4, 1), 1),
        ((13,), (1,), 0),
        ((2,), (12,), 0),
        ((1,), (1,), 12),
        ((2,), (-1,), 5),
        ((-2,), (1,), 5),
        ((2,), (1,), -1),
        ((0,), (1,), 0),
        ((2, 2), (1,), 0),
        ((1,) * 9, (1,) * 9, 0),
        ((2**31, 2**31), (0, 0), 0),  # one number spread over an exabyte
        ((2**62, 2), (2**62, 1), 0),
        ((13,), (0,), 0),
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, shape: Any, strides: Any, offset: int) -> None:
    pickle = files.program(files.dict_of({"x": files.tensor("0", "Float", 12, shape, strides, offset)}))
    assert "tensor" in refusal(tmp_path, files.archive(pickle, {"0": bytes(48)}))


def test_a_tensor_is_no_storage(tmp_path: Path) -> None:
    """A view of stride 0 at the storage's end, taken for a storage, would allow reading behind it."""
    rebuild = files.named("torch._utils", "_rebuild_tensor_v2")
    inner = files.tensor("0", "Float", 12, (12,), (0,), 11)
    one = files.tuple_of(files.number(1))
    outer = files.called(rebuild, inner, files.number(0), files.tuple_of(files.number(12)), one, b"\x89", b"}")
    assert "damaged" in refusal(tmp_path, files.archive(files.program(files.dict_of({"x": outer})), {"0": bytes(48)}))


# --- what is refused --------------------------------------------------------------------------------------------------


def _stored(pickle: bytes, **storages: bytes) -> bytes:
    return files.archive(files.program(pickle), storages)


_X = files.dict_of({"x": files.tensor("0", "Float", 1, (1,))})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"PK", "not a checkpoint"),
        (b"<!DOCTYPE html><html>404</html>", "DOCTYPE"),
        (b'{"model": "clip"}', "not a checkpoint"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "torch < 1.6; load it with torch"),
        (struct.pack("<Q", 2) + b"{", "not a checkpoint"),
        (struct.pack("<Q", 4) + b"{abc", "safetensors file is damaged"),
        (
            struct.pack("<Q", 60) + b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}     \0\0',
            "unknown dtype",
        ),
        (b"PK\x03\x04" + bytes(100), "archive is damaged"),
        (_stored(_X), "no entry 'archive/data/0'"),
        (_stored(_X, **{"0": b"123"}), "expected 4 bytes, got 3"),
        (_stored(b"N"), "holds no tensors"),
        (_stored(files.dict_of({"model": _X}), **{"0": bytes(4)}), "got ['model']"),
        (_stored(b""), "damaged"),
        (_stored(b"0"), "opcode POP"),
        (_stored(b"h\x07"), "damaged"),
        (_stored(b")t"), "damaged"),
        (_stored(b"}" + b"}" * 2 + b"s"), "damaged"),
        (_stored(files.storage("0", "BFloat16", 1)), "'torch.BFloat16Storage'"),
        (_stored(files.tuple_of(files.text("module")) + b"Q"), "names no storage"),
        (files.archive(files.program(_X), {"0": bytes(4)}, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (files.archive(files.program(_X), {"0": bytes(4)}, root="a/b"), "one <root>/data.pkl, got 0"),
        (_stored(files.text("x" * (5 << 20))), "data.pkl is too large"),
    ],
)
def test_refusals(tmp_path: Path, data: bytes, says: str) -> None:
    assert says in refusal(tmp_path, data)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            read_checkpoint(path)


def test_big_endian(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("m/data.pkl", files.program(_X))
        out.writestr("m/byteorder", b"big")
    assert "expected little" in refusal(tmp_path, file.getvalue())


# --- what would run ---------------------------------------------------------------------------------------------------


class _Reduced:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["root", "value", "inside arguments"])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, f"{os.name}.system"), (builtins.eval, "eval"), (os.mkdir, f"{os.name}.mkdir"), (getattr, "getattr")],
)
def test_calls_are_named_and_not_made(tmp_path: Path, protocol: int, where: str, function: Any, named: str) -> None:
    marker = tmp_path / "ran"
    arguments: dict[Any, tuple[Any, ...]] = {
        os.system: (f"touch '{marker}'",),
        builtins.eval: (f"__import__('pathlib').Path({str(marker)!r}).touch()",),
        os.mkdir: (str(marker),),
        getattr: ("", "join"),
    }
    bomb = _Reduced(function, *arguments[function])
    value = {"root": bomb, "value": {"a": 1, "x": bomb}, "inside arguments": _Reduced(OrderedDict, [("a", bomb)])}[
        where
    ]
    data = pickle.dumps(value, protocol=protocol)
    message = refusal(tmp_path, files.archive(data, {}))
    assert named in message or (protocol < 2 and "opcode" in message)  # those write dicts in opcodes torch never uses
    assert not marker.exists()
    if function is os.mkdir:  # the bomb is live: pickle itself would have set it off
        pickle.loads(data)
        assert marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "says"),
    [
        (files.called(files.named("os", "system"), files.text("true")), "'os.system'"),
        (files.called(files.named("__torch__.os", "system"), files.text("true")), "damaged"),  # inert
        (files.text("os") + files.text("system") + b"\x93" + files.tuple_of(files.text("true")) + b"R", "'os.system'"),
        (files.text("__torch__") + files.text("x") + b"\x93" + files.text("true") + b"\x85R", "damaged"),
        (files.number(1) + files.text("system") + b"\x93", "asks for"),
        (b"(" + files.text("true") + b"ios\nsystem\n", "'os.system'"),
        (b"(" + files.named("os", "system") + files.text("true") + b"o", "'os.system'"),
        (files.named("torch._utils", "_rebuild_tensor_v2.__globals__"), "__globals__"),
        (files.named("collections", "OrderedDict.fromkeys"), "fromkeys"),
        (files.named("torch", "load"), "'torch.load'"),
        (files.named("collections", "OrderedDict") + b")\x81", "damaged"),
        (files.called(files.named("collections", "OrderedDict"), files.text("abc")), "damaged"),
        (files.named("collections", "OrderedDict") + files.dict_of({"__code__": b"N"}) + b"b", "holds no tensors"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x94", "damaged"),
    ],
)
def test_hostile_opcodes(tmp_path: Path, opcodes: bytes, says: str) -> None:
    assert says in refusal(tmp_path, files.archive(files.program(opcodes), {}))


def _nested_modules() -> bytes:
    """Forty modules, each naming the next one twice: 2^40 values in 2 KiB of pickle."""
    opcodes = files.module("leaf", {}) + b"q\x00"
    for _ in range(40):
        children = files.text("a") + opcodes + files.text("b") + b"h\x00"
        opcodes = files.named("__torch__", "M") + b")\x81}(" + children + b"ubq\x00"
    return opcodes


def _module_in_itself() -> bytes:
    return files.named("__torch__", "M") + b")\x81q\x00}(" + files.text("me") + b"h\x00ubh\x00"


def _long_name() -> bytes:
    """A module in itself under a name of a million letters: fifty thousand levels would need 50 GB."""
    return files.named("__torch__", "M") + b")\x81q\x00}(" + files.text("x" * 1_000_000) + b"h\x00ubh\x00"


def _tuple_as_key() -> bytes:
    """A dict key of 60 doubled tuples: its hash would take 2^60 steps."""
    return b"}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns"


@pytest.mark.parametrize(
    ("opcodes", "says"),
    [
        (_nested_modules(), "too large"),
        (_module_in_itself(), "too large"),
        (_long_name(), "too large"),
        (_tuple_as_key(), "damaged"),
        (b"Nr\xff\xff\xff\x7f", "holds no tensors"),  # memo index two billion
        (b"(" * 300_000, "damaged"),
        (b"]" * 300_000, "holds no tensors"),
    ],
    ids=["tree", "loop", "name", "hash", "memo", "marks", "lists"],
)
def test_small_pickles_that_would_cost_a_lot(tmp_path: Path, opcodes: bytes, says: str) -> None:
    data = files.archive(files.program(opcodes), {})
    tracemalloc.start()
    started = time.process_time()
    try:
        assert says in refusal(tmp_path, data)
        assert time.process_time() - started < 10  # traced, on a busy machine
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_zip_bombs(tmp_path: Path) -> None:
    zeros = 64 << 20
    pickle = files.program(files.dict_of({"x": files.tensor("0", "Float", zeros // 4, (zeros // 4,))}))
    packed = files.archive(pickle, {"0": bytes(zeros)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(tmp_path, packed)

    stored = bytearray(files.archive(pickle, {"0": b"1234"}))  # a directory that claims 64 MiB
    entry = stored.rindex(b"archive/data/0") - 46
    stored[entry + 20 : entry + 28] = struct.pack("<II", zeros, zeros)
    assert "more bytes than the file has" in refusal(tmp_path, bytes(stored))


# --- damage -----------------------------------------------------------------------------------------------------------


def _read_or_refused(folder: Path, data: bytes) -> None:
    try:
        state = read(folder, data)
    except ModelError:
        return
    for value in state.values():  # every element can be touched
        value.copy()


_WRITTEN = [save(SMALL), files.torch_zip(SMALL), files.torchscript(SMALL)]


@FUZZ
@given(data=st.data(), written=st.sampled_from(_WRITTEN))
def test_flipped_bits(tmp_path: Path, data: st.DataObject, written: bytes) -> None:
    damaged = bytearray(written)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(written) - 1), min_size=1, max_size=8)):
        damaged[bit // 8] ^= 1 << bit % 8
    _read_or_refused(tmp_path, bytes(damaged))


@pytest.mark.parametrize("written", _WRITTEN[1:], ids=["torch zip", "TorchScript"])
def test_flipped_weights_are_noticed(tmp_path: Path, written: bytes) -> None:
    at = written.index(SMALL["visual.proj"].tobytes())
    damaged = written[:at] + b"\x01" + written[at + 1 :]
    assert "CRC" in refusal(tmp_path, damaged)


@pytest.mark.parametrize("written", _WRITTEN, ids=["safetensors", "torch zip", "TorchScript"])
def test_truncated(tmp_path: Path, written: bytes) -> None:
    for length in range(0, len(written), 7):
        refusal(tmp_path, written[:length])


@FUZZ
@given(data=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{", b"\x80\x02"]))
def test_random_bytes(tmp_path: Path, data: bytes, head: bytes) -> None:
    refusal(tmp_path, head + data)


_PIECES = st.sampled_from(
    [
        *(bytes([code]) for code in b"}]()tNQRubs.\x81\x85\x86\x87\x88\x94"),
        b"q\x00",
        b"h\x00",
        files.text("state_dict"),
        files.number(1),
        files.number(-1),
        files.named("collections", "OrderedDict"),
        files.named("torch._utils", "_rebuild_tensor_v2"),
        files.named("torch._utils", "_rebuild_parameter"),
        files.named("torch.jit._pickle", "build_intlist"),
        files.named("__torch__", "M"),
        files.storage("0", "Float", 4),
        files.tensor("0", "Float", 4, (2, 2)),
    ]
)


@settings(FUZZ, max_examples=400)
@given(pieces=st.lists(_PIECES, max_size=25))
def test_random_programs(tmp_path: Path, pieces: list[bytes]) -> None:
    _read_or_refused(tmp_path, files.archive(files.program(b"".join(pieces)), {"0": bytes(16)}))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("square", [False, True])  # a square projection hides a forgotten transpose
def test_hugging_face_names(square: bool) -> None:
    state = files.random_state(dim=64 if square else 32)
    theirs = files.hugging_face(state)
    assert theirs["text_projection.weight"].shape == ((64, 64) if square else (32, 64))
    assert same(openai_state(theirs), state)


def test_openai_names_are_kept_and_nothing_is_modified() -> None:
    state = files.random_state()
    for value in state.values():
        value.flags.writeable = False
    extras = {"context_length": np.array(77), "transformer.resblocks.0.attn_mask": np.zeros((16, 16), np.float32)}
    assert same(openai_state({**state, **extras}), state)
    assert same(openai_state(openai_state(state)), state)


def test_mini_is_complete() -> None:
    state = read_checkpoint(MINI)
    assert same(openai_state(state), state)


_BLOCK = "visual.transformer.resblocks.1"
_LAYER = "vision_model.encoder.layers.1"


@pytest.mark.parametrize(
    ("naming", "key", "shape", "says"),
    [
        (dict, "visual.conv1.weight", None, "key 'visual.conv1.weight' is missing"),
        (dict, "logit_scale", None, "key 'logit_scale' is missing"),
        (dict, f"{_BLOCK}.attn.in_proj_bias", None, f"key '{_BLOCK}.attn.in_proj_bias' is missing"),
        (dict, "visual.class_embedding", (1, 128), "expected (128,), got (1, 128)"),
        (dict, "visual.conv1.weight", (128, 3, 16), "expected (width, 3, patch, patch), got (128, 3, 16)"),
        (dict, "visual.conv1.weight", (128, 4, 16, 16), "expected (128, 3, 16, 16), got (128, 4, 16, 16)"),
        (dict, "visual.conv1.weight", (100, 3, 16, 16), "expected multiples of 64"),
        (dict, "visual.positional_embedding", (16, 128), "expected a square number and one, got 16"),
        (dict, "visual.positional_embedding", (0, 128), "expected (grid^2 + 1, width), got (0, 128)"),
        (dict, "visual.positional_embedding", (1, 128), "expected a square number and one, got 1"),
        (dict, f"{_BLOCK}.attn.in_proj_weight", (128, 384), "expected (384, 128), got (128, 384)"),
        (dict, "text_projection", (64, 33), "expected (128, 33), got (128, 32)"),
        (files.hugging_face, "vision_model.pre_layrnorm.bias", None, "'vision_model.pre_layrnorm.bias' is missing"),
        (
            files.hugging_face,
            f"{_LAYER}.self_attn.k_proj.weight",
            None,
            f"'{_LAYER}.self_attn.k_proj.weight' is missing",
        ),
        (
            files.hugging_face,
            f"{_LAYER}.self_attn.q_proj.bias",
            (64,),
            "q_proj.bias' has another shape: expected (128,)",
        ),
        (files.hugging_face, "visual_projection.weight", (128, 32), "expected (32, 128), got (128, 32)"),
        (files.hugging_face, "text_projection.weight", (32,), "expected (embedding, width), got (32,)"),
    ],
)
def test_missing_keys_and_wrong_shapes(naming: Any, key: str, shape: tuple[int, ...] | None, says: str) -> None:
    state = naming(files.random_state())
    assert key in state
    del state[key]
    if shape is not None:
        state[key] = np.zeros(shape, np.float32)
    with pytest.raises(ModelError) as caught:
        openai_state(state)
    assert says in str(caught.value)


def test_a_missing_block() -> None:
    state = {key: value for key, value in files.random_state().items() if not key.startswith("visual.transformer")}
    with pytest.raises(ModelError, match=r"visual\.transformer\.resblocks\.0\..* is missing"):
        openai_state(state)


@pytest.mark.parametrize(("value", "says"), [(np.nan, "finite"), (np.inf, "finite"), (0, "expected floats, got int64")])
def test_weights_are_finite_floats(value: Any, says: str) -> None:
    state = files.random_state()
    state["ln_final.bias"] = np.full(64, value)
    with pytest.raises(ModelError, match=says):
        openai_state(state)


@pytest.mark.parametrize("state", [{}, {"conv1.weight": np.zeros(1)}])
def test_no_clip(state: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match="no CLIP state dict"):
        openai_state(state)


# --- torch's own files ------------------------------------------------------------------------------------------------


def test_files_that_torch_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch writes the files here")
    state = {key: torch.from_numpy(value) for key, value in files.random_state(dtype=np.float16).items()}
    state["visual.proj"] = torch.arange(4096, dtype=torch.float32).reshape(32, 128).T  # not contiguous
    state["visual.class_embedding"] = torch.arange(300, dtype=torch.float32)[5:261:2]  # an offset and a stride
    expected = {key: value.numpy() for key, value in state.items()}
    for protocol in (2, 3, 4, 5):
        torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
        assert same(read_checkpoint(tmp_path / "a.pt"), expected)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "b.pt")
    assert same(read_checkpoint(tmp_path / "b.pt"), expected)
    torch.save({key: torch.nn.Parameter(value) for key, value in state.items()}, tmp_path / "c.pt")
    assert same(read_checkpoint(tmp_path / "c.pt"), expected)
    torch.save(state, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"torch < 1\.6"):
        read_checkpoint(tmp_path / "d.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "e.pt")
    with pytest.raises(ModelError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        read_checkpoint(tmp_path / "e.pt")


def test_torch_reads_the_files_written_here(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch judges the hand-written files here")
    state = files.random_state(dtype=np.float16)
    for nested in (False, True):
        (tmp_path / "a.pt").write_bytes(files.torch_zip(state, nested=nested))
        got = torch.load(tmp_path / "a.pt", weights_only=True)
        assert same({key: value.numpy() for key, value in (got["state_dict"] if nested else got).items()}, state)


def test_safetensors_file(tmp_path: Path) -> None:
    save_file(SMALL, tmp_path / "small")
    assert same(read_checkpoint(tmp_path / "small"), SMALL)
