"""Whether a camera answers: of a name with several addresses, within one time-out for all of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from edge.errors import CaptureError
from edge.knock import connected, knock

TIMEOUT = 0.8  # s


def place(listener: socket.socket) -> tuple[Any, ...]:
    """As socket.getaddrinfo tells it."""
    return (socket.AF_INET, socket.SOCK_STREAM, 0, "", listener.getsockname())


@pytest.fixture
def deaf() -> Iterator[list[tuple[Any, ...]]]:
    """Four addresses that never answer: what they listen with is full."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)) for _ in range(4)]
        for listener in listeners:
            for _ in range(4):
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                with suppress(BlockingIOError):
                    caller.connect(listener.getsockname())
        yield [place(listener) for listener in listeners]


def test_addresses_that_never_answer_take_one_timeout_together(deaf: list[tuple[Any, ...]]) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        connected(deaf, TIMEOUT)
    assert time.monotonic() - start < 2 * TIMEOUT


def test_the_last_of_them_has_its_share(deaf: list[tuple[Any, ...]]) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as good,
        connected([*deaf, place(good)], TIMEOUT) as connection,
    ):
        assert connection.getpeername() == good.getsockname()


def test_nobody_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(CaptureError, match="cannot be opened: connection refused"):
            knock(f"http://127.0.0.1:{held.getsockname()[1]}/", TIMEOUT)
