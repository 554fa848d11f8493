"""ONNX Runtime behind the seam: what runs, and that whatever goes wrong is a BackendError."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge.backend import Session, TensorSpec, open_session
from edge.errors import BackendError
from edge.ort import OrtSession
from tests.fakes import FakeSession


def model(kind: int = TensorProto.FLOAT) -> bytes:
    """sum = a + b, double = a + a, over (n, 3)."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Add", ["a", "a"], ["double"])],
        "sums",
        [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "ab"],
        [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in ("sum", "double")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


A, B = np.array([[1, 2, 3]], np.float32), np.array([[10, 20, 30]], np.float32)


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("from_file", [True, False])
def test_a_graph_runs_from_a_file_or_from_bytes(from_file: bool, threads: int, tmp_path: Path) -> None:
    path = tmp_path / "sums.onnx"
    path.write_bytes(model())
    with open_session(path if from_file else model(), threads=threads) as session:
        assert session.inputs == {name: TensorSpec(np.dtype(np.float32), (None, 3)) for name in "ab"}
        assert session.outputs == {name: TensorSpec(np.dtype(np.float32), (None, 3)) for name in ("sum", "double")}
        outputs = session.run({"a": A, "b": B})
    assert list(outputs) == ["sum", "double"]
    assert outputs["sum"].tolist() == [[11, 22, 33]]
    assert outputs["double"].tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("n", [0, 1, 33])
def test_the_batch_axis_is_free_and_outputs_belong_to_the_caller(n: int) -> None:
    rows = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    with OrtSession(model()) as session:
        first = session.run({"a": rows, "b": rows})
        kept = first["sum"].copy()
        session.run({"a": rows + 1, "b": rows})
        assert (first["sum"] == kept).all(), "a second run leaves the first one's outputs alone"
    assert (kept == 2 * rows).all()
    assert kept.shape == (n, 3)


@pytest.mark.parametrize("n", [0, 1, 33])
def test_sessions_that_share_memory_leave_each_others_outputs_alone(n: int) -> None:
    rows = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    with OrtSession(model(), shared=True) as one, OrtSession(model(), shared=True) as other:
        first = one.run({"a": rows, "b": rows})
        second = other.run({"a": rows + 1, "b": rows})
        one.run({"a": rows + 5, "b": rows})
        one.close()
        assert (first["sum"] == 2 * rows).all()
        assert (second["sum"] == 2 * rows + 1).all()
        assert (other.run({"a": rows, "b": rows + 3})["sum"] == 2 * rows + 3).all(), "also when another is closed"


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("n", [0, 1, 4, 33])
def test_what_is_run_in_parts_comes_back_whole(n: int, rows: int) -> None:
    a, b = np.random.default_rng(n).normal(size=(2, n, 3)).astype(np.float32)
    with OrtSession(model(), rows=rows) as session:
        outputs = session.run({"a": a, "b": b})
    assert list(outputs) == ["sum", "double"]
    np.testing.assert_array_equal(outputs["sum"], a + b)
    np.testing.assert_array_equal(outputs["double"], a + a)


def test_a_run_has_no_more_rows_than_it_may() -> None:
    """The graph's own output says how many it was given."""
    shape = helper.make_node("Shape", ["a"], ["shape"])
    tell = helper.make_node("Expand", ["one", "shape"], ["told"])
    count = helper.make_node("ReduceSum", ["told", "rows"], ["count"], keepdims=1)
    wide = helper.make_node("Expand", ["count", "shape"], ["seen"])
    graph = helper.make_graph(
        [shape, tell, count, wide],
        "rows",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("seen", TensorProto.FLOAT, ["n", 1])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [1, 1], [1.0]),
            helper.make_tensor("rows", TensorProto.INT64, [1], [0]),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with OrtSession(made.SerializeToString(), rows=4) as session:
        seen = session.run({"a": np.zeros((10, 1), np.float32)})["seen"]
    assert seen[:, 0].tolist() == [4] * 8 + [2] * 2


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(
    ("feeds", "part"),
    [
        ({}, "a"),
        ({"a": A}, "b"),
        ({"a": A, "B": B}, "B"),
        ({"a": A, "b": B, "c": B}, "c"),
        ({"a": A, "b": B.astype(np.float64)}, "double"),
        ({"a": A, "b": B.astype(np.uint8)}, "uint8"),
        ({"a": A, "b": B[:, :2]}, "b"),
        ({"a": A, "b": B[0]}, "b"),
        ({"a": np.zeros((2, 3), np.float32), "b": np.zeros((4, 3), np.float32)}, "2"),
        ({"a": np.zeros((5, 3), np.float32), "b": np.zeros((4, 3), np.float32)}, "5"),
        ({"a": A, "b": None}, "b"),
    ],
)
def test_wrong_feeds_are_a_backend_error(feeds: dict[str, Any], part: str, rows: int | None) -> None:
    with OrtSession(model(), rows=rows) as session:
        with pytest.raises(BackendError, match=r"^graph in memory: ONNX Runtime \d") as caught:
            session.run(feeds)
        assert part in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert session.run({"a": A, "b": B})["sum"].tolist() == [[11, 22, 33]], "the session goes on"


@pytest.mark.parametrize("content", [b"", b"garbage", model()[:-9], b"\0" * 1000])
def test_what_is_no_graph_is_a_backend_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    for graph, name in ((path, str(path)), (content, "graph in memory")):
        with pytest.raises(BackendError, match=r"ONNX Runtime .* cannot load it") as caught:
            open_session(graph)
        assert str(caught.value).startswith(name)
        assert len(str(caught.value).splitlines()) == 1


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(BackendError, match=str(path)):
            open_session(path)


def test_a_graph_of_a_type_that_no_contract_speaks_of_says_so() -> None:
    with pytest.raises(BackendError, match=r"double"):
        OrtSession(model(TensorProto.DOUBLE))


def test_a_closed_session_says_so() -> None:
    with OrtSession(model()) as session:
        pass
    with pytest.raises(BackendError, match="graph in memory: the session is closed"):
        session.run({"a": A, "b": B})
    session.close()  # twice is no mistake


def test_the_session_closes_also_after_an_error() -> None:
    session = OrtSession(model())
    with pytest.raises(BackendError, match="ONNX Runtime"), session:
        session.run({})
    with pytest.raises(BackendError, match="closed"):
        session.run({"a": A, "b": B})


@pytest.mark.parametrize("one", [OrtSession(model()), FakeSession({})])
def test_real_and_fake_session_fit_the_protocol(one: Session) -> None:
    with one as entered:
        assert entered is one
        for name, wanted in vars(Session).items():
            if name.startswith("_"):
                continue
            assert hasattr(one, name), name
            if inspect.isfunction(wanted):
                assert list(inspect.signature(getattr(one, name)).parameters) == [
                    parameter for parameter in inspect.signature(wanted).parameters if parameter != "self"
                ]


def test_it_leaves_nothing_in_a_home_and_tells_nobody(tmp_path: Path, root: Path) -> None:
    """Versions since 1.29 note every session there, and send it to their maker, unless they are told in time."""
    (tmp_path / "home").mkdir()
    (tmp_path / "graph.onnx").write_bytes(model())
    told = ("HOME", "XDG_CACHE_HOME", "CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY")  # in CI it is quiet
    env = {name: value for name, value in os.environ.items() if name not in told}
    program = (
        "import sys; from pathlib import Path; from edge.ort import OrtSession; OrtSession(Path(sys.argv[1])).close()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "graph.onnx")]
    subprocess.run(words, cwd=root, env={**env, "HOME": str(tmp_path / "home")}, check=True, timeout=60)
    assert list((tmp_path / "home").rglob("*")) == []
