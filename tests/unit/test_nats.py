"""Which addresses and streams a sink in NATS takes; tests/flow/test_jetstream.py asks a real server."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.nats import Address, _captures, address_of
from edge.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "servers", "login"),
    [
        ("nats://centre", ["nats://centre:4222"], {}),
        ("tls://centre:4333/", ["tls://centre:4333"], {}),
        ("nats://[::1]:1", ["nats://[::1]:1"], {}),
        ("nats://a:1,nats://b:2", ["nats://a:1", "nats://b:2"], {}),
        ("nats://me:a%40b@c,nats://d", ["nats://c:4222", "nats://d:4222"], {"user": "me", "password": "a@b"}),
        ("nats://word@c", ["nats://c:4222"], {"token": "word"}),
    ],
)
def test_an_address(url: str, servers: list[str], login: dict[str, str]) -> None:
    assert address_of(url) == Address(tuple(servers), login)
    assert str(address_of(url)) == ",".join(servers)
    assert all(word not in f"{address_of(url)!r} {address_of(url)}" for word in login.values() if word != "me")


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("", "no such scheme"),
        ("centre:4222", "no such scheme"),
        ("http://secret@centre", "no such scheme"),
        ("ws://secret@centre", "no such scheme"),
        ("nats://", "no host"),
        ("nats://secret@", "no host"),
        ("nats://secret@centre:port", "a host or port that cannot be"),
        ("nats://secret@centre:99999", "a host or port that cannot be"),
        ("nats://secret@[::1", "a host or port that cannot be"),
        ("nats://secret@a b", "a host that cannot be"),
        ("nats://secret@centre:4222/subject", "something behind the port"),
        ("nats://secret@centre?x", "something behind the port"),
        ("nats://a,", "no such scheme"),
        ("nats://secret@a,tls://b", "nats:// and tls:// together"),
        ("secret:secret@centre:4222", "no such scheme"),
        ("nats:secret@centre", "no such scheme"),
    ],
)
def test_no_address(url: str, got: str) -> None:
    with pytest.raises(ConfigError) as caught:
        address_of(url)
    assert caught.value.got == got
    assert "secret" not in str(caught.value)


@given(st.text(max_size=40))
def test_whatever_is_given_is_an_address_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert address_of(text).servers


@pytest.mark.parametrize(
    ("pattern", "yes"),
    [
        ("lookout.>", True),
        (">", True),
        ("lookout.event.*", True),
        ("lookout.*.*", True),
        ("*.event.>", True),
        ("lookout.event.>", True),
        ("lookout.event.*.>", False),
        ("lookout.event", False),
        ("lookout.event.box", False),
        ("lookout.gone.*", False),
        ("lookout.*", False),
        ("other.>", False),
    ],
)
def test_which_subjects_capture_all_events(pattern: str, yes: bool) -> None:
    assert _captures(pattern, "lookout.event.*") is yes
