"""The HTTP server that tells how a program is: real requests to a real server, polite clients and others."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from edge.errors import ConfigError
from edge.health import MOST, Health, Verdict
from tests.conftest import Deadline

ANYWHERE = "127.0.0.1:0"


class Told:
    """A Subject that says what it is told to."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.verdict = Verdict(True)
        self.held = threading.Event()  # status() waits for it
        self.held.set()
        Gauge("things", "Some", registry=self.registry).set(3)

    def live(self) -> Verdict:
        return self.verdict

    def ready(self) -> Verdict:
        return self.verdict

    def status(self) -> Mapping[str, Any]:
        self.held.wait()
        return {"name": "Tür \U0001f6aa\n\x00", "age": None, "broken": "\ud800"}


@pytest.fixture
def told() -> Iterator[Told]:
    subject = Told()
    yield subject
    subject.held.set()


@pytest.fixture
def health(told: Told) -> Iterator[Health]:
    with Health(ANYWHERE, told) as health:
        yield health


def ask(health: Health, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, content type, body."""
    connection = http.client.HTTPConnection(health.address, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def plug(health: Health) -> socket.socket:
    host, _, port = health.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it was not even looked at
        return True


@pytest.mark.parametrize(
    ("verdict", "status", "body"),
    [
        (Verdict(True), 200, "ok\n"),
        (Verdict(True, ("camera 'gate' is away",)), 200, "ok\ncamera 'gate' is away\n"),
        (Verdict(False, ("one\nline\r\n\r\nand no more",)), 503, "not ok\none line and no more\n"),
        (Verdict(False, ("a name of \ud800 halves",)), 503, "not ok\na name of ? halves\n"),
    ],
)
def test_a_verdict_is_a_status_and_a_line_each(
    health: Health, told: Told, verdict: Verdict, status: int, body: str
) -> None:
    told.verdict = verdict
    for path in ("/livez", "/readyz", "/readyz?verbose=1"):
        assert ask(health, path) == (status, "text/plain; charset=utf-8", body)


def test_status_is_json_whatever_names_hold(health: Health) -> None:
    status, kind, body = ask(health, "/status")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {"name": "Tür \U0001f6aa\n\x00", "age": None, "broken": "?"}


def test_metrics_come_in_either_format(health: Health) -> None:
    status, kind, body = ask(health, "/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert [one.name for one in prometheus(body)] == ["things"]
    _, kind, body = ask(health, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.split(";")[0] == "application/openmetrics-text"
    assert [one.samples[0].value for one in openmetrics(body)] == [3.0]


def test_head_has_the_length_and_no_body(health: Health) -> None:
    connection = http.client.HTTPConnection(health.address, timeout=10)
    connection.request("HEAD", "/livez")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Length"], answer.read()) == (200, "3", b"")
    connection.close()


@pytest.mark.parametrize("path", ["/", "/metricss", "/livez/", "/%2e%2e/etc/passwd", "/status/../livez"])
def test_nothing_else_is_there(health: Health, path: str) -> None:
    assert ask(health, path) == (404, "text/plain; charset=utf-8", "/livez /readyz /status /metrics\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "<script>"])
def test_nothing_can_be_done_but_to_ask(health: Health, method: str) -> None:
    status, kind, body = ask(health, "/livez", method)
    assert (status, kind) == (501, "text/plain; charset=utf-8")
    assert "<script>" not in body


def test_a_fault_is_an_answer_and_a_log_line(health: Health, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    told.verdict = None  # type: ignore[assignment]
    assert ask(health, "/livez")[0] == 500
    assert "cannot tell how it is" in caplog.text
    assert ask(health, "/metrics")[0] == 200


def test_requests_and_clients_that_leave_are_not_logged(
    health: Health, told: Told, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], deadline: Deadline
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    told.held.clear()
    with plug(health) as rude:
        rude.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of a goodbye
    told.held.set()
    with plug(health) as strange:
        strange.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")  # as TLS begins
        with deadline("an answer to what is no HTTP", 10):
            strange.recv(1000)
    assert ask(health, "/livez")[0] == 200
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_slow_client_holds_up_nobody(health: Health, told: Told, deadline: Deadline) -> None:
    told.held.clear()
    with plug(health) as silent, plug(health) as slow, plug(health) as waiting:
        slow.sendall(b"GET /live")
        waiting.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        with deadline("a scrape beside three slow clients", 4):  # they may be silent for longer
            assert ask(health, "/metrics")[0] == 200
        told.held.set()
        with deadline("what waited", 10):
            assert waiting.recv(15) == b"HTTP/1.0 200 OK"
        assert silent.getpeername()


def test_of_too_many_connections_the_oldest_end(health: Health, deadline: Deadline) -> None:
    """Whoever opens connections without end shuts nobody out, and takes no more than MOST threads."""
    before = threading.active_count()
    open_ones = [plug(health) for _ in range(3 * MOST)]
    try:
        with deadline("a scrape in a crowd", 4):
            assert ask(health, "/metrics")[0] == 200
            assert all(hung_up(one) for one in open_ones[:MOST])
        assert threading.active_count() - before <= MOST + 5, "but for those about to end"
    finally:
        for one in open_ones:
            one.close()


def test_closing_does_not_wait_for_the_silent(told: Told, deadline: Deadline) -> None:
    health = Health(ANYWHERE, told)
    with plug(health) as silent, deadline("closing", 4):
        silent.sendall(b"GET")
        health.close()
        health.close()
        assert hung_up(silent)
    assert not [thread for thread in threading.enumerate() if thread.name == "health"]


def test_an_answer_at_hand_still_leaves(told: Told) -> None:
    health = Health(ANYWHERE, told)
    told.held.clear()
    with plug(health) as asking:
        asking.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        ask(health, "/livez")  # by then that thread has begun, too
        threading.Timer(0.2, told.held.set).start()
        health.close()
        assert asking.recv(15) == b"HTTP/1.0 200 OK"


def test_nowhere_is_nowhere(told: Told) -> None:
    before = threading.active_count()
    with Health("", told) as health:
        assert health.address == ""
        assert threading.active_count() == before


def test_the_port_that_the_system_chose_is_logged(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Health(ANYWHERE, told) as health:
        port = int(health.address.rpartition(":")[2])
        assert port > 0
        assert f"health at http://127.0.0.1:{port}" in caplog.text


def test_ipv6(told: Told) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with Health("[::1]:0", told) as health:
        assert health.address.startswith("[::1]:")
        assert ask(health, "/livez")[0] == 200


def test_a_taken_port_is_said_with_its_key(told: Told) -> None:
    with Health(ANYWHERE, told) as health:
        with pytest.raises(ConfigError, match=rf"health\.address: cannot listen on {health.address}: .*in use.*''"):
            Health(health.address, told)
        with pytest.raises(ConfigError, match=r"--health: cannot listen"):
            Health(health.address, told, "--health")
    with Health(health.address or ANYWHERE, told) as again:
        assert ask(again, "/livez")[0] == 200


@pytest.mark.parametrize(
    "address",
    [
        "9477",
        ":9477",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:٣",
        "a:b",
        "x" * 70 + ":1",
        "192.0.2.1:0",
        "\ud800:0",
        "a..b:0",
    ],
)
def test_an_address_that_cannot_be_is_a_mistake_of_the_operator(told: Told, address: str) -> None:
    with pytest.raises(ConfigError, match=r"^health\.address: ") as caught:
        Health(address, told)
    assert len(str(caught.value).splitlines()) == 1


def test_the_collector_shares_it_without_the_rest_of_the_box(root: Path) -> None:
    text = (root / "edge/health.py").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(("from edge", "import edge"))] == [
        "from edge.errors import ConfigError"
    ]
