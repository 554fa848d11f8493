"""Weights arrive whole or not at all: mirror, cache, resume, wrong sums and broken servers, over real loopback HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge.errors import ConfigError, ModelError
from export.weights import OFFICIAL, Source, cache_folder, fetch

BODY = random.Random(7).randbytes(300_000)
HALF = len(BODY) // 2
SUM = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY with ranges; `script` holds what the next requests get instead, one entry each."""

    daemon_threads = False  # so that server_close() waits for every connection

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.ranges: list[str | None] = []  # the Range header of each request
        self.sent = 0  # bytes of bodies handed to the network
        self.over = threading.Event()  # lets stalled connections go

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
        (self.server.script.pop(0) if self.server.script else ranged)(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def start(self) -> int:
        """The first byte asked for."""
        return int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.server.sent += len(data)  # before the client can have them, and end the test
        self.wfile.write(data)


def ranged(handler: Handler, upto: int = len(BODY), shift: int = 0) -> None:
    """Serves as asked, up to byte `upto`; `shift` makes it send (and say) another range."""
    start = handler.start() + shift
    if start >= len(BODY):
        handler.head(416, Content_Range=f"bytes */{len(BODY)}", Content_Length=0)
        return
    if handler.headers["Range"]:
        handler.head(206, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}", Content_Length=len(BODY) - start)
    else:
        handler.head(200, Content_Length=len(BODY))
    handler.body(BODY[start:upto])


def cut_at(upto: int) -> Callable[[Handler], None]:
    return lambda handler: ranged(handler, upto)


def stall_at(upto: int) -> Callable[[Handler], None]:
    def stall(handler: Handler) -> None:
        ranged(handler, upto)
        handler.server.over.wait(30)

    return stall


def silent(handler: Handler) -> None:
    handler.server.over.wait(30)


def whole(handler: Handler) -> None:
    """Knows no ranges."""
    handler.head(200, Content_Length=len(BODY))
    handler.body(BODY)


def endless(handler: Handler) -> None:
    """Tells no length."""
    handler.head(200, Connection="close")
    handler.body(BODY)


def wrong(handler: Handler) -> None:
    handler.head(200, Content_Length=5)
    handler.body(b"wrong")


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, Content_Length=0)


def redirect(handler: Handler, to: str = "/elsewhere") -> None:
    handler.head(302, Location=to, Content_Length=0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def get(server: Server, cache: Path, *, size: int | None = None, timeout: float = 10) -> Path:
    """`fetch` of the server's file, three tries with no waits between them."""
    source = Source("file.bin", SUM, server.url, size)
    return fetch(source, mirror=None, cache=cache, timeout=timeout, tries=3, pause=0)


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_downloads_once_and_then_serves_from_the_cache(server: Server, cache: Path) -> None:
    assert get(server, cache) == cache / "file.bin"
    assert get(server, cache).read_bytes() == BODY
    assert server.ranges == [None]
    assert left(cache) == {"file.bin"}


@pytest.mark.parametrize("size", [None, len(BODY)])
@pytest.mark.parametrize("cuts", [[HALF], [1000, HALF, 299_999], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_continues_after_cuts_and_asks_for_no_byte_twice(
    server: Server, cache: Path, cuts: list[int], size: int | None
) -> None:
    # The last row has more cuts than tries: only tries that bring nothing count.
    server.script = [cut_at(cut) for cut in cuts]
    assert get(server, cache, size=size).read_bytes() == BODY
    assert server.ranges == [None, *(f"bytes={cut}-" for cut in cuts)]
    assert server.sent == len(BODY)


def test_continues_after_a_stall(server: Server, cache: Path) -> None:
    server.script = [stall_at(HALF)]
    assert get(server, cache, timeout=0.5).read_bytes() == BODY
    assert server.ranges[1] == f"bytes={HALF}-"


def test_gives_up_when_nothing_moves_and_keeps_the_part_for_the_next_call(server: Server, cache: Path) -> None:
    server.script = [cut_at(HALF), *[cut_at(0)] * 3]
    with pytest.raises(ModelError, match=rf"cannot download file.bin from {server.url}.*byte {HALF} of 300000"):
        get(server, cache)
    assert left(cache) == {"file.bin.part"}
    assert get(server, cache).read_bytes() == BODY
    assert server.sent == len(BODY)


def test_a_killed_process_is_continued_by_the_next(server: Server, cache: Path) -> None:
    server.script = [stall_at(HALF)]
    code = f"""
from pathlib import Path
from export.weights import Source, fetch
fetch(Source("file.bin", {SUM!r}, {server.url!r}), mirror=None, cache=Path({str(cache)!r}))
"""
    part, deadline = cache / "file.bin.part", time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while not (part.exists() and part.stat().st_size == HALF):
            assert time.monotonic() < deadline, "the first half never arrived"
            assert process.poll() is None, "the process ended before it was killed"
        process.kill()
    assert get(server, cache).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("plain", [whole, endless])
def test_a_server_without_ranges_restarts_cleanly(
    server: Server, cache: Path, plain: Callable[[Handler], None]
) -> None:
    server.script = [cut_at(HALF), plain]
    assert get(server, cache).read_bytes() == BODY


def test_a_server_that_always_restarts_and_always_cuts_is_given_up(server: Server, cache: Path) -> None:
    def restart(handler: Handler) -> None:
        handler.head(200, Content_Length=len(BODY))
        handler.body(BODY[:HALF])

    server.script = [restart] * 10
    with pytest.raises(ModelError, match="cannot download"):
        get(server, cache)
    assert len(server.ranges) == 4  # the first, which brought something, and three that did not


def test_another_range_than_asked_is_not_glued_on(server: Server, cache: Path) -> None:
    server.script = [cut_at(HALF), lambda handler: ranged(handler, shift=100)]
    assert get(server, cache).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    ("part", "size", "ranges"),
    [
        (BODY, None, ["bytes=300000-"]),  # 416 says that all is there
        (BODY, len(BODY), []),
        (BODY + b"more", None, ["bytes=300004-", None]),
        (BODY + b"more", len(BODY), [None]),
        (b"", None, [None]),
    ],
)
def test_a_part_that_is_complete_or_too_long(
    server: Server, cache: Path, part: bytes, size: int | None, ranges: list[str | None]
) -> None:
    cache.mkdir()
    (cache / "file.bin.part").write_bytes(part)
    assert get(server, cache, size=size).read_bytes() == BODY
    assert server.ranges == ranges


def test_a_wrong_sum_names_both_and_keeps_nothing(server: Server, cache: Path) -> None:
    server.script = [wrong]
    with pytest.raises(ModelError) as caught:
        get(server, cache)
    for word in ("file.bin", SUM, hashlib.sha256(b"wrong").hexdigest(), server.url, "LOOKOUT_WEIGHTS"):
        assert word in str(caught.value)
    assert left(cache) == set()


def test_a_damaged_part_costs_one_failed_call_and_no_more(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "file.bin.part").write_bytes(b"x" * HALF)
    with pytest.raises(ModelError, match="another file"):
        get(server, cache)
    assert get(server, cache).read_bytes() == BODY


def test_a_wrong_file_in_the_cache_is_replaced(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    (cache / "file.bin").write_bytes(b"rotten")
    assert get(server, cache).read_bytes() == BODY
    assert "removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "asked"),
    [([404], 1), ([403], 1), ([410], 1), ([416], 1), ([503] * 3, 3), ([429, 503, 404], 3)],
)
def test_refusals_name_the_address_and_the_remedy(server: Server, cache: Path, answers: list[int], asked: int) -> None:
    server.script = [status(code) for code in answers]
    with pytest.raises(ModelError, match=rf"{server.url}.*HTTP {answers[-1]}.*set LOOKOUT_WEIGHTS=that folder"):
        get(server, cache)
    assert len(server.ranges) == asked


def test_a_server_busy_for_a_moment_is_asked_again(server: Server, cache: Path) -> None:
    server.script = [status(503), status(429)]
    assert get(server, cache).read_bytes() == BODY


def test_nobody_there(cache: Path) -> None:
    with Server() as server:
        pass  # its port is free again
    with pytest.raises(ModelError, match=r"Connection refused.*LOOKOUT_WEIGHTS"):
        get(server, cache)


def test_silence_is_a_timeout(server: Server, cache: Path) -> None:
    server.script = [silent] * 3
    with pytest.raises(ModelError, match="timed out"):
        get(server, cache, timeout=0.1)


def test_redirects_are_followed_ranges_and_all(server: Server, cache: Path) -> None:
    server.script = [redirect, cut_at(HALF), redirect]
    assert get(server, cache).read_bytes() == BODY
    assert server.ranges == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


def test_a_redirect_to_a_local_file_is_refused(server: Server, cache: Path) -> None:
    server.script = [lambda handler: redirect(handler, "file:///etc/passwd")]
    with pytest.raises(ModelError, match="HTTP 302"):
        get(server, cache)


def test_the_mirror_comes_first_and_no_request_leaves(server: Server, cache: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "file.bin").write_bytes(BODY)
    source = Source("file.bin", SUM, server.url)
    assert fetch(source, mirror=mirror, cache=cache) == mirror / "file.bin"
    assert server.ranges == []
    assert not cache.exists()

    (mirror / "file.bin").write_bytes(b"wrong")
    with pytest.raises(ModelError, match=rf"{mirror}/file.bin is another file: expected sha256 {SUM}, got"):
        fetch(source, mirror=mirror, cache=cache)
    assert (mirror / "file.bin").read_bytes() == b"wrong"  # the user's: never removed
    assert server.ranges == []

    (mirror / "file.bin").unlink()
    assert fetch(source, mirror=mirror, cache=cache) == cache / "file.bin"


def test_a_mirror_that_is_no_folder_is_no_silent_download(server: Server, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*mistyped.*LOOKOUT_WEIGHTS"):
        fetch(Source("file.bin", SUM, server.url), mirror=tmp_path / "mistyped", cache=cache)
    assert server.ranges == []


def test_many_at_once_fetch_it_once(server: Server, cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = [future.result(30) for future in [pool.submit(get, server, cache) for _ in range(8)]]
    assert {path.read_bytes() for path in paths} == {BODY}
    assert server.sent == len(BODY)
    assert left(cache) == {"file.bin"}


def test_a_cache_that_cannot_be_written_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot read or keep file.bin.*XDG_CACHE_HOME"):
        get(server, tmp_path / "cache")


def test_a_log_gets_one_line(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.script = [cut_at(HALF)]
    get(server, cache)
    assert capfd.readouterr() == ("", f"downloading file.bin from {server.url}\n")


def test_a_terminal_gets_a_bar(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    master, slave = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(master, 4096):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, contextlib.redirect_stderr(terminal):
        get(server, cache)
    reader.join(10)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "file.bin" in text
    assert "300.0/300.0 kB" in text


@pytest.mark.parametrize(
    ("name", "sha256", "url", "what"),
    [
        ("../file", SUM, "https://host/file", "bare file name"),
        ("", SUM, "https://host/file", "bare file name"),
        ("file", SUM.upper(), "https://host/file", "64 lower-case hex digits"),
        ("file", SUM, "file:///etc/passwd", "expected http:// or https://"),
        ("file", SUM, "ftp://host/file", "expected http:// or https://"),
    ],
)
def test_what_cannot_be_a_source(name: str, sha256: str, url: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        Source(name, sha256, url)


def test_the_official_files() -> None:
    assert set(OFFICIAL) == {"yolov4.weights", "yolov4.cfg", "ViT-B-32.pt", "bpe_simple_vocab_16e6.txt.gz"}
    assert all(source.url.startswith("https://") for source in OFFICIAL.values())
    vocabulary = OFFICIAL["bpe_simple_vocab_16e6.txt.gz"]
    shipped = (Path(__file__).parents[2] / "export" / "mini" / vocabulary.name).read_bytes()
    assert (hashlib.sha256(shipped).hexdigest(), len(shipped)) == (vocabulary.sha256, vocabulary.bytes)


def test_the_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lookout"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "lookout"
