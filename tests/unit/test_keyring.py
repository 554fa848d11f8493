"""The allow list says whose key is whose, is edited in one step and taken up in use; a damaged one changes nothing."""

from __future__ import annotations

import logging
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from collector.cli import main
from collector.keyring import (
    ALLOWED,
    KEY,
    ZAP_ADDRESS,
    Keyring,
    Zap,
    allow,
    deny,
    new_keyring,
    read_allowed,
)
from collector.sessions import ANYONE
from edge.errors import ConfigError
from edge.keys import is_key

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to someone else")


def public(number: int) -> str:
    """A public key; another for each number."""
    return z85.encode(number.to_bytes(32, "little")).decode()


A, B, C = public(1), public(2), public(3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_keyring(tmp_path / "keys")
    return tmp_path / "keys"


def written(folder: Path, text: str | bytes) -> Path:
    """allowed.txt with this in it, as an editor would write it."""
    path = folder / ALLOWED
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def collector(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)), prog_name="collector")


# ---- the list ----


def test_allowed_and_denied(folder: Path) -> None:
    assert allow(folder, "door", A)
    assert allow(folder, "door", B), "while keys are changed a device has two"
    assert not allow(folder, "door", A), "it was so already"
    assert allow(folder, "Tür 3, Hof №2 🚪", C)
    assert read_allowed(folder / ALLOWED) == {A: "door", B: "door", C: "Tür 3, Hof №2 🚪"}
    assert deny(folder, "door", A) == [A]
    assert read_allowed(folder / ALLOWED) == {B: "door", C: "Tür 3, Hof №2 🚪"}
    assert deny(folder, "Tür 3, Hof №2 🚪") == [C]
    assert allow(folder, "door", A)
    assert deny(folder, "door") == [B, A]
    assert read_allowed(folder / ALLOWED) == {}


def test_a_key_belongs_to_one_device(folder: Path) -> None:
    allow(folder, "door", A)
    with pytest.raises(ConfigError, match="this is a key of 'door', and a key belongs to one device; take it"):
        allow(folder, "gate", A)
    with pytest.raises(ConfigError, match="a key belongs to one device"):
        allow(folder, ANYONE, A)
    assert read_allowed(folder / ALLOWED) == {A: "door"}


@pytest.mark.parametrize(
    ("device", "key", "said"),
    [
        ("gate", None, "there is no key of 'gate'"),
        ("gate", C, "there is no such key of 'gate'"),
        ("door", C, "there is no such key of 'door'"),
        ("door", B, "this is a key of 'yard', not of 'door'"),
        ("Door", A, "this is a key of 'door', not of 'Door'"),
        ("door", "abc", "KEY: not a public key"),
        ("", None, "there is no key of ''"),
    ],
)
def test_nothing_to_take_is_an_error(folder: Path, device: str, key: str | None, said: str) -> None:
    allow(folder, "door", A)
    allow(folder, "yard", B)
    before = (folder / ALLOWED).stat()
    with pytest.raises(ConfigError) as caught:
        deny(folder, device, key)
    assert said in str(caught.value)
    assert (folder / ALLOWED).stat() == before, "not even touched"


@pytest.mark.parametrize(
    "device", ["", " ", " door", "door ", "a\nb", "a\rb", "a\0b", "a\x1bb", "a\x85b", "\u3000x", "x" * 201, "\ud800"]
)
def test_what_no_line_can_hold_is_no_name(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=r"^DEVICE: not a device's name"):
        allow(folder, device, A)
    assert not (folder / ALLOWED).exists()


@pytest.mark.parametrize("key", ["", "abc", A + "0", "0" * 40, "x" * 39 + "é", f"{A} {B}"])
def test_what_is_no_key_is_not_allowed(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"^KEY: not a public key"):
        allow(folder, "door", key)
    assert not (folder / ALLOWED).exists()


def test_what_people_wrote_stays(folder: Path) -> None:
    text = f"\ufeff# ours\n\n  {A}\t door \r\n#{B} off for now\n# {C}\n{B}   the gate"
    path = written(folder, text)
    assert read_allowed(path) == {A: "door", B: "the gate"}
    allow(folder, "yard", C)
    assert path.read_bytes().decode() == text.removeprefix("\ufeff") + f"\n{C} yard\n"
    deny(folder, "the gate")
    assert path.read_bytes().decode() == f"# ours\n\n  {A}\t door \r\n#{B} off for now\n# {C}\n{C} yard\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{A} door\nnonsense\n", "line 2: expected KEY DEVICE, got no key at its beginning"),
        (f"door {A}\n", "line 1: expected KEY DEVICE, got no key at its beginning"),
        (f"{A}\n", "line 1: expected KEY DEVICE, got no device's name after the key"),
        (f"# {A} door\n\n{A[:-1]} door", "line 3: expected KEY DEVICE, got no key"),
        (f"{A} {'x' * 201}", "got no device's name"),
        (f"{A} door\n{B} gate\n{A} gate\n", "line 3: a line before gives this key to another device"),
        (b"\xff\xfe", "not UTF-8 text"),
        (f"{A} a\0b", "no device's name"),
    ],
)
def test_a_damaged_list_is_an_error_that_names_the_line_and_does_not_show_it(
    folder: Path, text: str | bytes, said: str
) -> None:
    path = written(folder, text)
    edits = (lambda: allow(folder, "door", C), lambda: deny(folder, "door"), lambda: Keyring(folder))
    for refused in (lambda: read_allowed(path), *edits):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value).startswith(f"{path}: ")
        assert said in str(caught.value)
        assert A[:8] not in str(caught.value), "it could be a secret, pasted by mistake"
    assert path.read_bytes() == (text if isinstance(text, bytes) else text.encode())


def test_the_same_line_twice_is_no_damage(folder: Path) -> None:
    path = written(folder, f"{A} door\n{A} door\n{B} door\n")
    assert read_allowed(path) == {A: "door", B: "door"}
    assert deny(folder, "door", A) == [A]
    assert path.read_text() == f"{B} door\n"


names = st.text(min_size=1, max_size=200).filter(
    lambda name: name == name.strip() and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
)
keys = st.binary(min_size=32, max_size=32).filter(any).map(lambda data: z85.encode(data).decode())


@given(st.dictionaries(keys, names, min_size=1, max_size=8), st.data())
def test_what_was_allowed_is_read_back_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, devices: dict[str, str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    new_keyring(folder)
    for key, device in devices.items():
        assert allow(folder, device, key)
    assert read_allowed(folder / ALLOWED) == devices
    key = data.draw(st.sampled_from(sorted(devices)))
    assert deny(folder, devices[key], key) == [key]
    del devices[key]
    assert read_allowed(folder / ALLOWED) == devices


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    path.chmod(0o600)
    with suppress(ConfigError):
        assert all(is_key(key) for key in read_allowed(path))


# ---- the files ----


def test_folder_key_and_list_are_the_owners_own(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        new_keyring(tmp_path / "keys")
        allow(tmp_path / "keys", "door", A)
    finally:
        os.umask(before)
    assert mode(tmp_path / "keys") == 0o700
    assert mode(tmp_path / "keys" / KEY) == 0o600
    assert mode(tmp_path / "keys" / ALLOWED) == 0o600
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [ALLOWED, KEY]


@pytest.mark.parametrize(
    ("name", "bits"), [(KEY, 0o644), (KEY, 0o640), (ALLOWED, 0o622), (ALLOWED, 0o660), (".", 0o777)]
)
def test_files_that_others_could_use_are_refused_with_the_remedy(folder: Path, name: str, bits: int) -> None:
    allow(folder, "door", A)
    (folder / name).chmod(bits)
    with pytest.raises(ConfigError) as caught:
        Keyring(folder)
    remedy = str(caught.value).partition("; ")[2].partition(", and")[0]
    subprocess.run(shlex.split(remedy), check=True, timeout=10)
    with Keyring(folder) as keyring:
        assert keyring.device_of(A) == "door"


def test_a_list_that_others_may_read_is_no_harm(folder: Path) -> None:
    allow(folder, "door", A)
    (folder / ALLOWED).chmod(0o644)
    with Keyring(folder) as keyring:
        assert keyring.device_of(A) == "door"


def test_a_folder_without_a_key_is_no_keyring(tmp_path: Path) -> None:
    for use in (lambda: Keyring(tmp_path), lambda: allow(tmp_path, "door", A), lambda: deny(tmp_path, "door")):
        with pytest.raises(ConfigError, match=r"no collector\.key in it; make one with `collector keys new --keys "):
            use()
    assert not list(tmp_path.iterdir())


def test_a_second_key_is_not_made(folder: Path) -> None:
    before = (folder / KEY).read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        new_keyring(folder)
    assert (folder / KEY).read_bytes() == before


@needs_root
def test_roots_edit_leaves_the_list_to_the_owner_of_the_folder(folder: Path) -> None:
    os.chown(folder, 12345, 23456)
    allow(folder, "door", A)
    status = (folder / ALLOWED).stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


def test_what_a_killed_edit_left_is_in_nobodys_way(folder: Path) -> None:
    (folder / "allowed.new").write_text("half a li")
    (folder / "allowed.new").chmod(0o400)
    allow(folder, "door", A)
    assert read_allowed(folder / ALLOWED) == {A: "door"}
    assert not (folder / "allowed.new").exists()


def test_a_full_disk_leaves_the_list_that_was_there_and_no_half_a_key(folder: Path, tmp_path: Path) -> None:
    allow(folder, "door", A)
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from collector.keyring import allow, new_keyring\n"
        "from tests.unit.test_keyring import B\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # bytes\n"
        "for write in (lambda: allow(Path(sys.argv[1]), 'gate', B), lambda: new_keyring(Path(sys.argv[2]))):\n"
        "    try: write()\n"
        "    except OSError as error: print(error.strerror)\n"
    )
    words = [sys.executable, "-B", "-c", program, str(folder), str(tmp_path / "second")]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "File too large\n" * 2, done.stderr
    assert read_allowed(folder / ALLOWED) == {A: "door"}
    assert list((tmp_path / "second").iterdir()) == []
    allow(folder, "gate", B)
    assert read_allowed(folder / ALLOWED) == {A: "door", B: "gate"}


def test_two_processes_that_allow_at_once_lose_nothing(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from collector.keyring import allow, deny\n"
        "from tests.unit.test_keyring import public\n"
        "for n in map(int, sys.argv[2:]):\n"
        "    allow(Path(sys.argv[1]), f'box {n}', public(n)); allow(Path(sys.argv[1]), f'box {n}', public(1000 + n))\n"
        "    deny(Path(sys.argv[1]), f'box {n}', public(1000 + n))\n"
    )
    each = [list(range(start, 61, 3)) for start in (1, 2, 3)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), *map(str, numbers)], cwd=Path(__file__).parents[2]
        )
        for numbers in each
    ]
    read: list[int] = []
    while any(process.poll() is None for process in running):
        read.append(len(read_allowed(folder / ALLOWED)))  # never half a file
    assert [process.wait(30) for process in running] == [0, 0, 0]
    assert read_allowed(folder / ALLOWED) == {public(n): f"box {n}" for n in range(1, 61)}
    assert len(set(read)) > 2, "it was read while it was edited"


# ---- in use ----


def test_a_keyring_knows_whose_key_is_whose(folder: Path) -> None:
    allow(folder, "door", A)
    allow(folder, ANYONE, B)
    with Keyring(folder) as keyring:
        assert [keyring.device_of(key) for key in (A, B, C, "", A[:-1])] == ["door", ANYONE, None, None, None]
        assert zmq.curve_public(keyring.secret.encode()).decode() == keyring.public
        assert keyring.secret not in f"{keyring!r} {vars(keyring.__class__)!r}"
    assert keyring.secret == ""


def test_without_a_list_nobody_may_write(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Keyring(folder) as keyring:
        keyring.refresh()
        assert keyring.device_of(A) is None
        assert not caplog.records
        allow(folder, "door", A)
        assert keyring.device_of(A) is None, "only refresh looks at the disk"
        keyring.refresh()
        assert keyring.device_of(A) == "door"


def test_a_change_is_taken_up_and_nothing_is_read_while_nothing_changes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "collector.keyring")
    allow(folder, "door", A)
    with Keyring(folder) as keyring:
        allow(folder, "gate", B)
        deny(folder, "door")
        for _ in range(5):
            keyring.refresh()
        assert (keyring.device_of(A), keyring.device_of(B)) == (None, "gate")
        assert [record.message for record in caplog.records] == [f"{folder / ALLOWED}: now 1 keys"]
        assert (folder / ALLOWED).read_text().count("\n") == 2
        with (folder / ALLOWED).open("a") as file:  # as an editor that writes in place
            file.write(f"{A} door\n")
        keyring.refresh()
        assert keyring.device_of(A) == "door"


@pytest.mark.parametrize("damage", ["nonsense", "two owners", "gone", "others can change it", "a folder", "unreadable"])
def test_a_list_that_cannot_be_used_leaves_the_old_one_in_force_and_is_said_once(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = folder / ALLOWED
    allow(folder, "door", A)
    with Keyring(folder) as keyring:
        if damage == "nonsense":
            written(folder, f"{A} door\n{B} gate\nnonsense")
        elif damage == "two owners":
            written(folder, f"{A} door\n{A} gate\n")
        elif damage == "gone":
            path.unlink()
        elif damage == "a folder":
            path.unlink()
            path.mkdir(mode=0o700)
        else:
            path.chmod(0o666 if damage == "others can change it" else 0)
        for _ in range(5):
            keyring.refresh()
            assert (keyring.device_of(A), keyring.device_of(B)) == ("door", None)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.message.startswith(f"{path}: ")
        assert record.message.endswith("; the list in force stays")
        assert A[:8] not in record.message
        if damage == "a folder":
            path.rmdir()
        elif damage == "unreadable":
            path.chmod(0o600)
        written(folder, f"{B} gate\n")
        keyring.refresh()
        assert (keyring.device_of(A), keyring.device_of(B)) == (None, "gate"), "a mended one is taken up at once"


# ---- the answers to handshakes ----


@contextmanager
def asked(folder: Path) -> Iterator[tuple[Zap, zmq.Socket[bytes]]]:
    """A Zap, and a socket that asks it as libzmq does."""
    with (
        zmq.Context() as context,
        Keyring(folder) as keyring,
        Zap(context, keyring) as zap,
        context.socket(zmq.REQ) as socket,
    ):
        socket.linger = 0
        socket.rcvtimeo = 5000
        socket.connect(ZAP_ADDRESS)
        yield zap, socket


def answer(zap: Zap, socket: zmq.Socket[bytes], *frames: bytes) -> list[bytes]:
    socket.send_multipart(frames)
    assert zap.socket.poll(5000)
    zap.handle()
    return socket.recv_multipart()


def request(key: str, address: bytes = b"10.0.0.7") -> list[bytes]:
    return [b"1.0", b"17", b"lookout", address, b"", b"CURVE", z85.decode(key)]


def test_an_allowed_key_comes_in_under_its_own_name(folder: Path) -> None:
    with asked(folder) as (zap, socket):
        zap.handle()  # nobody has asked: it does not wait
        assert answer(zap, socket, *request(A))[2] == b"400"
        allow(folder, "door", A)
        assert answer(zap, socket, *request(A)) == [b"1.0", b"17", b"200", b"OK", A.encode(), b""], "taken up at once"
        deny(folder, "door")
        assert answer(zap, socket, *request(A))[2:] == [b"400", b"this key is not allowed here", b"", b""]
        assert zap.refused == 2


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"1.0"],
        [b"1.0", b"17"],
        [b"1.0", b"17", b"lookout", b"10.0.0.7", b"", b"NULL"],
        [b"1.0", b"17", b"lookout", b"10.0.0.7", b"", b"PLAIN", b"door", b"secret"],
        [b"1.0", b"17", b"lookout", b"10.0.0.7", b"", b"CURVE"],
        [b"1.0", b"17", b"lookout", b"10.0.0.7", b"", b"CURVE", b""],
        [b"1.0", b"17", b"lookout", b"10.0.0.7", b"", b"CURVE", A.encode()],
        [*request(A), b"more"],
        [b"2.0", *request(A)[1:]],
    ],
)
def test_whatever_else_is_asked_the_answer_is_no(folder: Path, frames: list[bytes]) -> None:
    allow(folder, "door", A)
    with asked(folder) as (zap, socket):
        said = answer(zap, socket, *frames)
        assert (said[0], said[1:2], said[2], said[4:]) == (b"1.0", frames[1:2] or [b""], b"400", [b"", b""])
        assert answer(zap, socket, *request(A))[2] == b"200", "and goes on"


def test_a_flood_of_wrong_keys_is_counted_and_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with asked(folder) as (zap, socket):
        for number in range(1, 31):
            answer(zap, socket, *request(public(number), b"" if number > 1 else b"10.0.0.7"))
        assert zap.refused == 30
        assert caplog.records[0].message == f"refused 10.0.0.7: the key {A[:8]}… is not allowed (1 so far)"
        assert len(caplog.records) < 4, "one a second"
        assert A not in caplog.text


# ---- the commands ----


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    made = collector("keys", "new", "--keys", tmp_path / "fresh")
    assert made.exit_code == 0, made.output
    with Keyring(tmp_path / "fresh") as keyring:
        assert made.output.startswith(f"public key: {keyring.public}\n")
        assert made.output.endswith(f'\n[publish]\ncollector_key = "{keyring.public}"\n')
        assert keyring.secret not in made.output

    def said(*words: str) -> tuple[int, str]:
        result = collector(*words, "--keys", folder)
        return result.exit_code, result.output

    assert said("allow", "the door", A) == (0, f"the door: allowed {A}\n")
    assert said("allow", "the door", A) == (0, f"the door: had already {A}\n")
    assert said("allow", "*", B) == (0, f"*: allowed {B}\n")
    code, text = said("allow", "gate", A)
    assert (code, text[:38]) == (78, "error: this is a key of 'the door', an")
    assert said("deny", "the door", A) == (0, f"the door: denied {A}\n")
    code, text = said("deny", "the door")
    assert (code, text) == (78, f"error: {folder / ALLOWED}: there is no key of 'the door'\n")
    assert said("deny", "*") == (0, f"*: denied {B}\n")
    assert said("keys", "new")[0] == 78
    assert said("allow", "door")[0] == 2


def test_a_key_like_an_option_can_be_given_after_two_dashes(folder: Path) -> None:
    key = "-" + A[1:]
    assert is_key(key)
    assert collector("allow", "--keys", folder, "--", "-v", key).exit_code == 0
    assert read_allowed(folder / ALLOWED) == {key: "-v"}
    assert collector("deny", "--keys", folder, "--", "-v", key).exit_code == 0
