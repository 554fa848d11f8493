"""Every error is one line with an exit code of its own."""

from __future__ import annotations

import pickle

import pytest

from edge import errors
from edge.commands import INTERRUPTED, IO_ERROR
from edge.errors import ConfigError, LookoutError, StoreError

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LookoutError)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LookoutError("no camera"), "no camera"),
        (LookoutError("no camera", remedy="plug it in"), "no camera; plug it in"),
        (LookoutError("cameras", expected=1), "cameras: expected 1"),
        (LookoutError("cameras", got=0), "cameras: got 0"),  # 0 and "" are findings too
        (LookoutError("name", got=repr("")), "name: got ''"),
        (LookoutError("cameras", expected=1, got=0, remedy="add one"), "cameras: expected 1, got 0; add one"),
        (LookoutError("a\nb\r\n  c\td", got="x\n\ny"), "a b c d: got x y"),
        (LookoutError("", got="a line\u2028another\x85third"), ": got a line another third"),
    ],
)
def test_an_error_is_one_line(error: LookoutError, line: str) -> None:
    assert str(error) == line
    assert len(str(error).splitlines()) <= 1


def test_the_tree_is_the_one_that_is_drawn() -> None:
    for kind in TREE:
        assert kind.__name__ in (errors.__doc__ or "")
        if kind is not LookoutError:
            assert kind.__bases__ == (LookoutError,)
            assert f"{kind.__name__:<14} {kind.exit_code} " in (errors.__doc__ or ""), "the drawn exit code"
    assert (errors.__doc__ or "").count("── ") == len(TREE) - 1


def test_exit_codes_are_distinct() -> None:
    reserved = {0, 1, 2, INTERRUPTED}  # success, a fault of the program, click's usage error, Ctrl-C
    codes = [kind.exit_code for kind in TREE]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & reserved
    assert all(0 < code < 126 for code in codes), "126 and up are the shell's"
    assert StoreError.exit_code == IO_ERROR, "a disk that refuses is the same to a script, whoever noticed"


def test_an_error_keeps_its_parts_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("what", expected=1, got=2, remedy="r")))
    assert type(error) is ConfigError
    assert str(error) == "what: expected 1, got 2; r"
