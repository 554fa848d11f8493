"""Log records as journald gets them: read back by a reader that knows the protocol alone, from real sockets."""

from __future__ import annotations

import array
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.journald import JournalHandler, encode


def read(data: bytes) -> dict[str, str]:
    """The fields of a datagram, by https://systemd.io/JOURNAL_NATIVE_PROTOCOL."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Journald:
    """A socket like journald's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(10)

    def record(self) -> tuple[dict[str, str], bool]:
        """The next one, and whether it came as a file."""
        data, rights, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        if not rights:
            return read(data), False
        (file,) = array.array("i", rights[0][2])
        with os.fdopen(file, "rb") as sealed:
            with pytest.raises(OSError, match="not permitted"):
                os.write(file, b"x")
            sealed.seek(0)
            return read(sealed.read()), True

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    journal = Journald(tmp_path / "journal")
    yield journal
    journal.close()


@pytest.fixture
def log(journald: Journald) -> Iterator[logging.Logger]:
    log, handler = logging.Logger("edge.test"), JournalHandler(journald.path)
    log.addHandler(handler)
    yield log
    handler.close()


def test_a_record_has_its_fields(journald: Journald, log: logging.Logger) -> None:
    log.warning("camera %r: %s", "gate", "away", extra={"camera": "gate", "seconds": 3})
    fields, _ = journald.record()
    assert fields.pop("CODE_LINE").isdecimal()
    assert fields == {
        "MESSAGE": "camera 'gate': away",
        "PRIORITY": "4",
        "LOGGER": "edge.test",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_a_record_has_its_fields",
        "CAMERA": "gate",
        "SECONDS": "3",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (25, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_levels_are_those_of_syslog(journald: Journald, log: logging.Logger, level: int, priority: int) -> None:
    log.log(level, "x")
    assert journald.record()[0]["PRIORITY"] == str(priority)


def test_a_traceback_is_part_of_the_message(journald: Journald, log: logging.Logger) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    message = journald.record()[0]["MESSAGE"]
    assert message.startswith("it failed\nTraceback")
    assert message.endswith("ValueError: two\nlines")


def test_what_is_too_long_for_a_datagram_comes_whole(journald: Journald, log: logging.Logger) -> None:
    text = "long\n" * 200_000
    log.info("%s", text)
    fields, as_file = journald.record()
    assert as_file
    assert fields["MESSAGE"] == text


NAMES = st.text(st.characters(codec="ascii"), min_size=1) | st.sampled_from(["camera", "message_", "_hidden", "9th"])


@given(st.text(), st.dictionaries(NAMES, st.text() | st.integers()))
def test_any_text_is_read_back_as_it_was(message: str, extra: dict[str, Any]) -> None:
    record = logging.makeLogRecord({"msg": message, "name": "edge", "levelno": logging.INFO})
    given_fields = {name: value for name, value in extra.items() if name not in vars(record)}
    vars(record).update(given_fields)
    fields = read(encode(record, message))
    assert fields["MESSAGE"] == message
    assert fields["PRIORITY"] == "6"
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
    for name in fields:
        assert set(name) <= allowed
        assert name[0].isalpha()
    if "camera" in given_fields and "CAMERA" not in given_fields:
        assert fields["CAMERA"] == str(given_fields["camera"])


def test_half_a_surrogate_is_no_reason_to_be_silent(journald: Journald, log: logging.Logger) -> None:
    log.info("%s", "file-\udcff")
    assert journald.record()[0]["MESSAGE"] == "file-\\udcff"


def test_a_journald_that_was_started_anew_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, handler = tmp_path / "journal", None
    first = Journald(path)
    handler, log = JournalHandler(path), logging.Logger("edge.test")
    log.addHandler(handler)
    log.info("one")
    assert first.record()[0]["MESSAGE"] == "one"
    first.close()
    path.unlink()
    log.info("two")
    second = Journald(path)
    log.info("three")
    assert second.record()[0]["MESSAGE"] == "three"
    second.close()
    handler.close()
    assert "two" in capsys.readouterr().err, "what nobody took is on stderr"


SAY = "import logging; from edge.journald import configure_logging; configure_logging(); logging.info('hello'); \
print(type(logging.getLogger().handlers[0]).__name__)"


@pytest.mark.parametrize(("stream", "handler"), [("own", "JournalHandler"), ("other", "StreamHandler"), ("", "Stream")])
def test_only_where_stderr_is_the_journal(root: Path, tmp_path: Path, stream: str, handler: str) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        status = os.fstat(stderr.fileno())
        streams = {"own": f"{status.st_dev}:{status.st_ino}", "other": f"{status.st_dev}:1", "": ""}
        env = {**os.environ, "JOURNAL_STREAM": streams[stream]}
        said = subprocess.run(
            [sys.executable, "-W", "error", "-c", SAY], cwd=root, env=env, stdout=subprocess.PIPE, stderr=stderr,
            text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        assert said.startswith(handler)
        stderr.seek(0)
        text = stderr.read()
    if stream != "own":
        assert text.endswith(" INFO root: hello\n")
        assert text[:4].isdecimal()
