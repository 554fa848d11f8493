"""What people may see of a camera's address, and what the camera is told."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.address import Address, parted, shown

HOSTS = st.sampled_from(["10.0.0.5", "10.0.0.5:554", "[::1]", "[fe80::1%25eth0]:8554", "camera.lan", "camera.lan:80"])
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1).map(lambda text: f"Zq7{text}Zq7")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rtsp://me:secret@10.0.0.5:554/main", "rtsp://me:***@10.0.0.5:554"),
        ("rtsp://me:se:c@ret@10.0.0.5/main", "rtsp://me:***@10.0.0.5"),
        ("rtsp://me:se@cr/et?@10.0.0.5/main", "rtsp://…"),
        ("rtsp://me:secret@[::1]:554/main", "rtsp://me:***@[::1]:554"),
        ("http://secret@10.0.0.5/", "http://***@10.0.0.5"),
        ("http://10.0.0.5/video?user=me&pwd=secret", "http://10.0.0.5"),
        ("http://10.0.0.5/video?mail=me@secret", "http://…"),
        ("rtsp://10.0.0.5:554/user=me&password=secret&channel=1", "rtsp://10.0.0.5:554"),
        ("configs/RTSP:/me:secret@10.0.0.5/x", "configs/RTSP:/me:***@10.0.0.5"),
        ("rtsp//me:secret@10.0.0.5/x", "rtsp//me:***@10.0.0.5/x"),
        ("me:secret@10.0.0.5/x", "me:***@10.0.0.5/x"),
        ("clips/me@home:1.avi", "clips/me@home:1.avi"),
        ("door:1.avi", "door:1.avi"),
        ("0", "0"),
        ("", ""),
    ],
)
def test_a_source_is_shown_without_its_secrets(source: str, expected: str) -> None:
    assert shown(source) == expected


@given(st.sampled_from(["rtsp", "rtsps", "http", "https", "RTSP"]), HOSTS, st.sampled_from(["", "me"]), SECRETS)
def test_no_secret_is_shown_wherever_it_stands(scheme: str, host: str, user: str, secret: str) -> None:
    """As it was typed: with the signs of an address in it, and written with %."""
    for word in (secret, quote(secret, safe="")):
        for source in (
            f"{scheme}://{user}:{word}@{host}/main",
            f"{scheme}://{word.replace(':', ';')}@{host}/main?x=1",  # what stands before a colon is a name
            f"{scheme}://{host}/user={user}&password={word}",
            f"{scheme}://{host}/video?token={word}#{word}",
            f"{scheme}://{user}:{word}@{host}/video?token={word}",
        ):
            told = shown(source)
            assert "Zq7" not in told, source
            assert told.startswith(scheme)


@given(HOSTS, SECRETS, SECRETS)
def test_a_camera_hears_what_was_written_with_percent(host: str, user: str, password: str) -> None:
    url = f"rtsp://{quote(user, safe='')}:{quote(password, safe='')}@{host}/a?b#c"
    assert parted(url) == Address(f"rtsp://{host}/a?b#c", user, password)


def test_an_address_without_a_user() -> None:
    assert parted("rtsp://10.0.0.5/x@y") == Address("rtsp://10.0.0.5/x@y")
    assert parted("rtsp://me@10.0.0.5") == Address("rtsp://10.0.0.5", "me")
    assert parted("rtsp://me:a:b@c@10.0.0.5/x") == Address("rtsp://10.0.0.5/x", "me", "a:b@c")
    assert "secret" not in repr(parted("rtsp://me:secret@10.0.0.5/x"))
