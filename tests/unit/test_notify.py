"""What systemd hears: a real datagram socket in its place."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge import notify


@pytest.fixture(autouse=True)
def nothing_failed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_failed", False)


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        if request.param == "abstract":
            listener.bind("\0" + name)
            name = "@" + name
        else:
            listener.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


def test_what_is_said(systemd: socket.socket) -> None:
    for tell, heard in ((notify.ready, b"READY=1"), (notify.stopping, b"STOPPING=1"), (notify.alive, b"WATCHDOG=1")):
        tell()
        assert systemd.recv(4096) == heard
    notify.status("2 cameras\nREADY=1")
    assert systemd.recv(4096) == b"STATUS=2 cameras READY=1", "a text cannot add a field"


def test_a_reload_says_when_it_began(systemd: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    notify.reloading()
    kind, _, at = systemd.recv(4096).partition(b"\nMONOTONIC_USEC=")
    assert kind == b"RELOADING=1"
    assert before <= int(at) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", [None, ""])
def test_without_systemd_nothing_is_said(
    address: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready()
    assert not caplog.records


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@nobody-listens-here", "vsock:2:1", "/" + "x" * 200])
def test_a_socket_that_fails_is_told_once_and_harms_nobody(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready()
    notify.alive()
    (record,) = caplog.records
    assert address in record.getMessage()
    assert "None" not in record.getMessage()


def test_a_systemd_that_does_not_read_does_not_hold_the_box_up(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "SECONDS", 0.01)
    for _ in range(100_000):
        notify.alive()
        if caplog.records:
            break
    assert "does not hear" in caplog.text
