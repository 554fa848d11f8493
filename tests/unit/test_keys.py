"""A key lies in a file that nobody else can read, is never overwritten, never shown, and asked for between machines."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from edge.config import PublishConfig, tomllib
from edge.errors import ConfigError
from edge.keys import (
    KeyPair,
    checked_key,
    is_key,
    needs_encryption,
    new_key,
    publish_keys,
    read_key,
)

# from the manual of libzmq: the RFC's test keys, known to everybody
PUBLIC = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
SECRET = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
FAR = "tcp://collector.example:5577"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def key_file(path: Path, text: str | bytes = SECRET + "\n", mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


# ---- what a key is ----


@given(st.binary(min_size=32, max_size=32))
def test_32_bytes_in_z85_are_a_key_unless_they_are_zero(data: bytes) -> None:
    assert is_key(z85.encode(data).decode()) == any(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        PUBLIC[:-1],
        PUBLIC + "0",
        PUBLIC[:-5],
        "0" * 40,
        "#" * 40,  # every character is one of Z85, but five of them are more than 32 bits
        PUBLIC[:-1] + '"',
        PUBLIC[:-1] + " ",
        PUBLIC[:-1] + "é",
        PUBLIC[:-1] + "\n",
    ],
)
def test_what_is_no_key_is_refused_without_being_shown(text: str) -> None:
    assert not is_key(text)
    with pytest.raises(ConfigError, match=r"^here: not a public key: expected the 40 characters") as caught:
        checked_key(text, "here")
    assert len(text) < 5 or text[:5] not in str(caught.value), "it may be a secret in the wrong place"


@given(st.text())
def test_no_text_breaks_the_check(text: str) -> None:
    assert is_key(text) <= (len(text) == 40)


@given(st.binary(min_size=32, max_size=32))
def test_no_key_looks_like_a_comment(data: bytes) -> None:
    assert not z85.encode(data).startswith(b"#")
    assert z85.encode(b"\xff" * 32) == b"%nSc0" * 8, "the last one"


# ---- the file ----


def test_a_new_key_is_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    before = os.umask(0)  # the widest there is
    try:
        public = new_key(tmp_path / "made/keys/box.key")
    finally:
        os.umask(before)
    assert mode(tmp_path / "made/keys/box.key") == 0o600
    assert mode(tmp_path / "made/keys") == 0o700
    key = read_key(tmp_path / "made/keys/box.key")
    assert key.public == public
    assert is_key(key.public)
    assert is_key(key.secret)
    assert zmq.curve_public(key.secret.encode()).decode() == public
    assert f"# {public}\n" in (tmp_path / "made/keys/box.key").read_text(), "for whoever lost it"


def test_every_key_is_another_and_none_looks_like_an_option(tmp_path: Path) -> None:
    public = {new_key(tmp_path / f"{number}.key") for number in range(200)}  # of which 2 or 3 would
    assert len(public) == 200
    assert not [key for key in public if key.startswith("-")]


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    new_key(tmp_path / "box.key")
    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize("there", ["a file", "a link to nothing", "a folder"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "box.key"
    if there == "a file":
        path.write_text("mine")
    elif there == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is there already, and a key is never overwritten"):
        new_key(path)
    assert not (tmp_path / "elsewhere").exists()
    assert there != "a file" or path.read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        SECRET + "\n",
        f"# a comment\n\n  {SECRET}  \n\n# {PUBLIC}\n",
        f"# caf\xe9\r\n{SECRET}\r\n".encode("latin-1"),
    ],
)
def test_a_key_file_is_read(tmp_path: Path, text: str | bytes) -> None:
    assert read_key(key_file(tmp_path / "k", text)) == KeyPair(PUBLIC, SECRET)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        f"# {SECRET}\n",
        f"{SECRET}\n{SECRET}\n",
        SECRET[:-1],
        f"secret = {SECRET}",
        "0" * 40,
        b"\xff\0" * 20_000,
    ],
)
def test_what_is_no_key_file_is_refused_without_being_shown(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"k: not a key file: expected one line with a secret key; ") as caught:
        read_key(key_file(tmp_path / "k", text))
    assert SECRET[:8] not in str(caught.value)


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected 0600, got {bits:04o}; chmod 600 ") as caught:
        read_key(key_file(tmp_path / "k", mode=bits))
    assert SECRET not in str(caught.value)
    (command,) = [part for part in str(caught.value).split("; ") if part.startswith("chmod")]
    Path(shlex.split(command.partition(",")[0])[2]).chmod(0o600)  # the remedy mends it
    assert read_key(tmp_path / "k").secret == SECRET


@pytest.mark.parametrize("bits", [0o400, 0o600, 0o700])
def test_other_modes_of_the_owners_own_are_good(tmp_path: Path, bits: int) -> None:
    assert read_key(key_file(tmp_path / "k", mode=bits)).public == PUBLIC


@pytest.mark.parametrize("name", ["missing", ".", "missing/k", "a\0b"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="`keys new` makes a key") as caught:
        read_key(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_of_somebody_elses_is_no_reason_for_a_new_one(tmp_path: Path) -> None:
    """As where root made it, and the service runs as lookout."""
    key_file(tmp_path / "k").chmod(0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="Permission denied; it has to belong to the user that this runs as"):
            read_key(tmp_path / "k")
    finally:
        if root:
            os.seteuid(0)


def test_the_secret_is_in_no_repr(tmp_path: Path) -> None:
    key = read_key(key_file(tmp_path / "k"))
    for shown in (repr(key), str(key), f"{[key]}", f"{key!r}"):
        assert PUBLIC in shown
        assert SECRET not in shown


def test_the_command_prints_what_the_collector_and_the_box_need(tmp_path: Path) -> None:
    edge = pytest.importorskip("edge.cli")
    path = tmp_path / 'a "box".key'
    result = CliRunner().invoke(edge.main, ["keys", "new", str(path)])
    assert result.exit_code == 0, result.output
    key = read_key(path)
    assert key.secret not in result.output
    lines = result.output.splitlines()
    assert lines[0] == f"public key: {key.public}"
    (command,) = [line for line in lines if line.startswith("collector ")]
    assert shlex.split(command) == ["collector", "allow", "DEVICE", key.public], "as a shell takes it"
    config = tomllib.loads(result.output[result.output.index("[publish]") :])
    assert config == {"publish": {"key": str(path), "collector_key": "…"}}

    result = CliRunner().invoke(edge.main, ["keys", "new", str(path)])
    assert result.exit_code == 78
    assert "never overwritten" in result.output
    assert read_key(path) == key


# ---- who needs one ----


@pytest.mark.parametrize(
    ("address", "needed"),
    [
        ("ipc:///run/lookout.sock", False),
        ("ipc://@lookout", False),
        ("inproc://lookout", False),
        ("tcp://127.0.0.1:5577", False),
        ("tcp://127.0.0.1:*", False),
        ("tcp://127.8.9.10:5577", False),
        ("tcp://localhost:5577", False),
        ("tcp://LocalHost:5577", False),
        ("tcp://[::1]:5577", False),
        ("tcp://*:5577", True),
        ("tcp://0.0.0.0:5577", True),
        ("tcp://[::]:5577", True),
        ("tcp://eth0:5577", True),
        ("tcp://192.168.1.7:5577", True),
        ("tcp://10.0.0.1:5577", True),
        ("tcp://128.0.0.1:5577", True),
        ("tcp://[fe80::1%eth0]:5577", True),
        ("tcp://[2001:db8::1]:5577", True),
        (FAR, True),
        ("tcp://localhost.example:5577", True),
        ("tcp://127.0.0.1.example:5577", True),
        ("tcp://127.0.0.1;10.0.0.1:5577", True),  # ZeroMQ's source;destination
        ("tcp://10.0.0.1;127.0.0.1:5577", True),
        ("tcp://", True),
        ("udp://127.0.0.1:5577", True),
        ("ws://127.0.0.1:5577", True),
        ("", True),
    ],
)
def test_everything_but_this_machine_needs_encryption(address: str, needed: bool) -> None:
    assert needs_encryption(address) is needed


# ---- what a configuration asks for ----


@pytest.mark.parametrize(
    "config",
    [
        PublishConfig(),
        PublishConfig(address="ipc:///run/c"),
        PublishConfig(address=FAR, insecure=True),
        PublishConfig(transport="push"),
        PublishConfig(transport="push", address=FAR, insecure=True),
    ],
)
def test_without_keys_where_that_is_allowed(config: PublishConfig) -> None:
    assert publish_keys(config) is None


@pytest.mark.parametrize("address", [FAR, "tcp://127.0.0.1:5577", "ipc:///run/c"])
@pytest.mark.parametrize("insecure", [False, True])
def test_keys_are_used_wherever_they_are_given(tmp_path: Path, address: str, insecure: bool) -> None:
    key = key_file(tmp_path / "k")
    config = PublishConfig(address=address, key=key, collector_key=PUBLIC, insecure=insecure)
    assert publish_keys(config) == (KeyPair(PUBLIC, SECRET), PUBLIC)


KEY = Path("/nowhere/box.key")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            PublishConfig(address=FAR),
            f"publish.address: {FAR} is another machine, and there are no keys; set publish.key",
        ),
        (PublishConfig(key=KEY), "publish.collector_key: missing"),
        (PublishConfig(address=FAR, key=KEY, insecure=True), "publish.collector_key: missing"),
        (PublishConfig(collector_key=PUBLIC), "publish.key: missing"),
        (PublishConfig(address=FAR, collector_key=PUBLIC, insecure=True), "publish.key: missing"),
        (PublishConfig(transport="push", address=FAR), 'publish.transport: "push" to another machine'),
        (
            PublishConfig(transport="push", key=KEY, collector_key=PUBLIC),
            "is never encrypted, but there are keys; remove",
        ),
        (PublishConfig(transport="push", key=KEY), "is never encrypted, but there are keys; remove"),
        (PublishConfig(transport="push", collector_key=PUBLIC, insecure=True), "is never encrypted"),
        (PublishConfig(key=KEY, collector_key=PUBLIC), "/nowhere/box.key: No such file or directory; `keys new`"),
    ],
)
def test_half_of_the_keys_or_none_is_said_with_its_remedy(config: PublishConfig, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        publish_keys(config)
    assert said in str(caught.value)
    assert caught.value.remedy


def test_a_collectors_key_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"publish\.collector_key: not a public key"):
        publish_keys(PublishConfig(key=key_file(tmp_path / "k"), collector_key="0" * 40))
