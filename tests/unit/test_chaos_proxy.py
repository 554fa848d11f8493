"""Each fault of the chaos proxy does what it says, seen by plain sockets at both of its ends."""

from __future__ import annotations

import gc
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from tests.chaos.proxy import DELAY, KINDS, Fault, Proxy, held_port

SECONDS = 10.0  # until a socket that waits gives up
SILENT = 0.3  # s after which nothing is taken to come


class Ends:
    """A proxy, something that listens behind it, and connections through it."""

    def __init__(self) -> None:
        self._held = held_port()
        self._listener = socket.create_server(("127.0.0.1", self._held.getsockname()[1]))
        self._listener.settimeout(SECONDS)
        self._open: list[socket.socket] = []
        self.proxy = Proxy(self._held.getsockname()[1], seed=3)

    def dial(self) -> socket.socket:
        """The near end of a new connection."""
        near = socket.create_connection(("127.0.0.1", self.proxy.port), SECONDS)
        self._open.append(near)
        return near

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """The near and the far end of a new connection."""
        near = self.dial()
        far, _ = self._listener.accept()
        far.settimeout(SECONDS)
        self._open.append(far)
        return near, far

    def listen_no_more(self) -> None:
        self._listener.close()

    def close(self) -> None:
        self.proxy.close()
        for each in (self._held, self._listener, *self._open):
            each.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with closing(Ends()) as ends:
        yield ends


def received(end: socket.socket, size: int) -> bytes:
    """Just so many bytes, or fewer at an end."""
    data = b""
    while len(data) < size and (more := end.recv(size - len(data))):
        data += more
    return data


def until_reset(end: socket.socket) -> bytes:
    """What comes before a reset. Fails at an orderly end and at silence."""
    data = b""
    try:
        while more := end.recv(65536):
            data += more
    except ConnectionResetError:
        return data
    raise AssertionError(f"an orderly end after {data!r}")


def silent(end: socket.socket) -> bool:
    """Whether nothing comes, neither a byte nor an end."""
    end.settimeout(SILENT)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(SECONDS)
    return False


def works(near: socket.socket, far: socket.socket) -> bool:
    near.sendall(b"there")
    far.sendall(b"back")
    return received(far, 5) == b"there" and received(near, 4) == b"back"


def test_without_faults_bytes_and_ends_pass_both_ways(ends: Ends) -> None:
    near, far = ends.connect()
    data = random.Random(0).randbytes(1 << 20)
    for source, target in ((near, far), (far, near)):
        source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        for start in range(0, len(data), 65536):
            source.sendall(data[start : start + 65536])
            assert received(target, 65536) == data[start : start + 65536]
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.sendall(b"a last word")
    far.close()
    assert received(near, 100) == b"a last word"
    assert not ends.proxy.hits


def test_two_connections_at_once(ends: Ends) -> None:
    first, second = ends.connect(), ends.connect()
    assert works(*second)
    assert works(*first)


def test_a_reset_passes(ends: Ends) -> None:
    near, far = ends.connect()
    assert works(near, far)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()
    until_reset(near)


def test_nobody_behind_it(ends: Ends) -> None:
    ends.listen_no_more()
    with pytest.raises(ConnectionResetError):  # by the connect itself, where it is slow
        received(ends.dial(), 1)


def test_refuse(ends: Ends) -> None:
    near, far = ends.connect()
    assert works(near, far)
    ends.proxy.begin(Fault("refuse", seconds=3600))
    until_reset(near)
    until_reset(far)
    with pytest.raises(ConnectionRefusedError):
        ends.dial()
    ends.proxy.calm()
    assert works(*ends.connect())
    assert ends.proxy.hits == {"refuse": 1}


def test_refuse_ends_by_itself(ends: Ends) -> None:
    ends.proxy.begin(Fault("refuse", seconds=0.5))
    ends.proxy.begin(Fault("refuse", seconds=1))
    end = time.monotonic() + SECONDS
    refused = 0
    while time.monotonic() < end:
        try:
            assert works(*ends.connect())
            break
        except ConnectionRefusedError:
            refused += 1
            time.sleep(0.01)
    else:
        raise AssertionError("it never listened again")
    assert refused
    assert ends.proxy.hits == {"refuse": 2}


def test_blackhole(ends: Ends) -> None:
    near, far = ends.connect()
    untouched = ends.connect()
    assert works(near, far)
    ends.proxy.begin(Fault("blackhole", seconds=3600))
    near.sendall(b"lost")
    new = ends.dial()
    new.sendall(b"lost")
    assert silent(far)
    assert silent(near)
    assert silent(new)
    ends.proxy.calm()
    near.sendall(b"a connection that lost bytes would only carry nonsense")
    new.sendall(b"nor does this one come back")
    assert silent(far)
    assert silent(new)
    near.close()
    assert silent(far), "its end was told"
    assert works(*untouched)
    assert works(*ends.connect())
    assert ends.proxy.hits == {"blackhole": 1}


def test_what_lasts_goes_on_until_it_has_met_something(ends: Ends) -> None:
    near, far = ends.connect()
    ends.proxy.begin(Fault("blackhole"))
    assert silent(near)
    near.sendall(b"lost")
    assert silent(far)
    assert works(*ends.connect()), "it is over"
    assert ends.proxy.hits == {"blackhole": 1}


def test_delay(ends: Ends) -> None:
    near, far = ends.connect()
    ends.proxy.begin(Fault("delay", seconds=3600))
    taken = []
    for _ in range(8):
        start = time.monotonic()
        assert works(near, far)
        taken.append(time.monotonic() - start)
    assert max(taken) > 0.2 * DELAY
    ends.proxy.calm()
    start = time.monotonic()
    for _ in range(8):
        assert works(near, far)
    assert time.monotonic() - start < sum(taken)
    assert ends.proxy.hits == {"delay": 1}


def test_reset(ends: Ends) -> None:
    near, far = ends.connect()
    assert works(near, far)
    ends.proxy.begin(Fault("reset"))
    assert silent(near), "it comes with a chunk, not before"
    near.sendall(b"not to arrive")
    assert until_reset(far) == b""
    until_reset(near)
    assert works(*ends.connect()), "once is once"
    assert ends.proxy.hits == {"reset": 1}


def test_half_open(ends: Ends) -> None:
    near, far = ends.connect()
    assert works(near, far)
    ends.proxy.begin(Fault("half-open"))
    far.sendall(b"not to arrive")
    assert silent(near)
    near.sendall(b"nor this")
    assert silent(far)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()
    assert silent(near), "its end was told"
    near.sendall(b"and it still looks open")
    assert works(*ends.connect())
    assert ends.proxy.hits == {"half-open": 1}


def test_cut(ends: Ends) -> None:
    data = bytes(range(256)) * 4
    lengths = set()
    for _ in range(10):
        near, far = ends.connect()
        assert works(near, far)
        ends.proxy.begin(Fault("cut"))
        near.sendall(data)
        part = until_reset(far)
        until_reset(near)
        assert data.startswith(part)
        assert len(part) < len(data)
        lengths.add(len(part))
    assert len(lengths) > 5, "at random places"
    assert works(*ends.connect())
    assert ends.proxy.hits == {"cut": 10}


def test_those_that_happen_once_wait_for_their_chunk(ends: Ends) -> None:
    near, far = ends.connect()
    ends.proxy.begin(Fault("reset", chunks=3))
    ends.proxy.begin(Fault("cut", chunks=1))
    for _ in range(3):
        near.sendall(b"passes")
        assert received(far, 6) == b"passes"
    near.sendall(b"not to arrive")
    until_reset(far)
    near, far = ends.connect()
    near.sendall(b"passes")
    assert received(far, 6) == b"passes"
    near.sendall(b"x")
    assert until_reset(far) == b""
    assert ends.proxy.hits == {"reset": 1, "cut": 1}


def test_after(ends: Ends) -> None:
    near, far = ends.connect()
    begun = time.monotonic()
    ends.proxy.begin(Fault("reset", after=0.3))
    try:
        while time.monotonic() < begun + SECONDS:
            near.sendall(b"x")
            far.recv(1)
    except ConnectionError:
        assert time.monotonic() - begun >= 0.3
    assert ends.proxy.hits == {"reset": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_calm_forgets_what_was_to_come(ends: Ends, kind: str) -> None:
    due = time.monotonic() + 0.5
    ends.proxy.begin(Fault(kind, after=0.5, seconds=3600))
    ends.proxy.begin(Fault(kind, after=3600, seconds=3600))
    ends.proxy.calm()
    near, far = ends.connect()
    while time.monotonic() <= due:
        assert silent(near)
    assert works(near, far)
    assert not ends.proxy.hits


def test_close_resets_and_frees_everything(ends: Ends) -> None:
    near, far = ends.connect()
    assert works(near, far)
    ends.proxy.close()
    until_reset(near)
    until_reset(far)
    with socket.create_server(("127.0.0.1", ends.proxy.port)):
        pass
    ends.proxy.close()


def test_a_held_port_can_be_listened_on_again_and_again() -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        for _ in range(3):
            with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
                pass
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))


def test_a_connection_that_arrives_as_it_stops_listening_is_closed(ends: Ends) -> None:
    """Hundreds of times, so that some come in every step of it; an unclosed one is a ResourceWarning, an error here."""
    over = threading.Event()

    def dial() -> None:
        while not over.is_set():
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", ends.proxy.port), SECONDS).close()

    dialling = [threading.Thread(target=dial) for _ in range(2)]
    for thread in dialling:
        thread.start()
    for _ in range(300):
        ends.proxy.begin(Fault("refuse", seconds=0.001))
    over.set()
    for thread in dialling:
        thread.join()
    ends.proxy.calm()
    ends.proxy.close()
    gc.collect()
