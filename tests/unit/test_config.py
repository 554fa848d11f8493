"""The operator's file: every key described and shown, every mistake said with file, key and what is allowed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel, ValidationError

from edge import config as module
from edge.cli import main
from edge.config import (
    EdgeConfig,
    HealthConfig,
    PublishConfig,
    RuntimeConfig,
    Settings,
    SpoolConfig,
    is_url_or_device,
    read_edge_config,
    read_toml,
)
from edge.errors import ConfigError

GOOD = 'device = "box"\nbundle = "../engines/b"\n\n[[camera]]\nname = "door"\nsource = "a.avi"\n'
MODELS = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Settings)]
SECTIONS = [name for name in EdgeConfig.model_fields if name not in ("device", "bundle", "camera")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edge.toml"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- what the repository ships ----


def test_every_key_is_described() -> None:
    assert len(MODELS) == 15
    for model in MODELS:
        assert model.__doc__
        for name, field in model.model_fields.items():
            section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert field.description or section, f"{model.__name__}.{name} has no description"


def test_every_model_is_frozen_and_strict() -> None:
    for model in MODELS:
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["strict"]
        assert not model.model_config["allow_inf_nan"]


def default(model: type[Settings], file: Path) -> Settings:
    """A section that a file does not have: its paths are relative to the file all the same."""
    return SpoolConfig(path=file.parent / "spool.db") if model is SpoolConfig else model()


def test_the_shipped_edge_toml_shows_every_key_with_its_default(root: Path) -> None:
    path = root / "configs/edge.toml"
    text = path.read_text(encoding="utf-8")
    fields = module.tomllib.loads(text)
    config = read_edge_config(path)
    assert set(fields) == set(EdgeConfig.model_fields)
    assert set(fields["camera"][0]) == set(module.CameraConfig.model_fields)
    for section in SECTIONS:
        model = EdgeConfig.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, Settings)
        shown = set(fields[section]) | set(re.findall(r"^# (\w+) = ", text, re.MULTILINE))  # keys without a default
        assert set(model.model_fields) <= shown, f"[{section}]"
        assert set(fields[section]) <= set(model.model_fields), f"[{section}]"
        assert getattr(config, section) == default(model, path), f"[{section}] shows other values than the defaults"


def test_the_shipped_edge_toml_says_something_of_every_key(root: Path) -> None:
    """A comment on each line that sets one, but for those whose value says all."""
    lines = (root / "configs/edge.toml").read_text(encoding="utf-8").splitlines()
    silent = {line.split(" =")[0] for line in lines if " = " in line and " # " not in line}
    assert silent <= {"bundle", "name", "backend", "fsync_ms"}


def test_the_shipped_demo_toml_loads(root: Path) -> None:
    config = read_edge_config(root / "configs/demo.toml")
    assert config.bundle == root / "configs/../engines/mini"
    assert config.camera[0].source == str(root / "configs/../out/vtest.avi")
    assert config.match.sensitive == ("gender",)


# ---- what is read ----


def test_a_small_file_has_every_default(path: Path) -> None:
    config = read_edge_config(written(path, GOOD))
    assert config.device == "box"
    for section in SECTIONS:
        assert getattr(config, section) == default(type(getattr(config, section)), path)
    with pytest.raises(ValidationError, match="frozen"):
        config.device = "other"  # type: ignore[misc]


def test_key_and_spool_are_relative_to_the_file(path: Path) -> None:
    config = read_edge_config(written(path, GOOD + '[publish]\nkey = "box.key"\n[spool]\npath = "/var/lib/s.db"\n'))
    assert config.publish.key == path.parent / "box.key"
    assert config.spool.path == Path("/var/lib/s.db")


def test_values_arrive(path: Path) -> None:
    more = (
        '[detect]\nthreshold = 1\noverlap = "merge"\n[match]\nsensitive = ["a", "b"]\n[publish]\naddress = "ipc://x"\n'
    )
    config = read_edge_config(written(path, GOOD + more))
    assert config.detect.threshold == 1.0
    assert config.detect.overlap == "merge"
    assert config.match.sensitive == ("a", "b")
    assert config.publish.address == "ipc://x"


@pytest.mark.parametrize("count", [1, 3])
def test_cameras_keep_their_order(count: int, path: Path) -> None:
    more = "".join(f'[[camera]]\nname = "c{i}"\nsource = "{i}"\n' for i in range(1, count))
    config = read_edge_config(written(path, GOOD + more))
    assert [camera.name for camera in config.camera] == ["door", *(f"c{i}" for i in range(1, count))]


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("a.avi", "HERE/a.avi"),
        ("../clips/a.avi", "HERE/../clips/a.avi"),
        ("/srv/a.avi", "/srv/a.avi"),
        ("0", "0"),
        ("12", "12"),
        ("rtsp://user:pw@host/1", "rtsp://user:pw@host/1"),
        ("RTSP://host/1", "RTSP://host/1"),
        ("http://host/a.mjpg", "http://host/a.mjpg"),
        ("gst+x-1.0://host", "gst+x-1.0://host"),
        ("0/a.avi", "HERE/0/a.avi"),
        ("door:1.avi", "HERE/door:1.avi"),
        ("rtsp:/host", "HERE/rtsp:/host"),
    ],
)
def test_paths_are_relative_to_the_file(source: str, seen: str, path: Path) -> None:
    config = read_edge_config(written(path, GOOD.replace("a.avi", source)))
    assert config.camera[0].source == seen.replace("HERE", str(path.parent))
    assert config.bundle == path.parent / "../engines/b"
    assert is_url_or_device(source) == (seen == source and not source.startswith("/"))


def test_an_absolute_bundle_stays_absolute(path: Path) -> None:
    assert read_edge_config(written(path, GOOD.replace("../engines/b", "/srv/b"))).bundle == Path("/srv/b")


def test_windows_line_ends_and_byte_order_mark(path: Path) -> None:
    """What an editor on a Windows workstation makes of the file."""
    assert read_edge_config(written(path, GOOD.replace("\n", "\r\n"))).device == "box"
    assert read_edge_config(written(path, b"\xef\xbb\xbf" + GOOD.encode())).device == "box"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["device: missing (and 2 more)"]),
        (GOOD.replace('device = "box"\n', ""), ["device: missing"]),
        (GOOD.replace('name = "door"\n', ""), ["camera.0.name: missing"]),
        (GOOD.replace('"box"', '""'), ["device: ", "at least 1 character", "got ''"]),
        (GOOD.replace('"box"', f'"{"x" * 201}"'), ["device: ", "at most 200 characters"]),
        (GOOD.replace('"box"', "5"), ["device: ", "valid string", "got 5"]),
        (GOOD.replace('"box"', "1979-05-27"), ["device: ", "valid string", "1979"]),
        (GOOD.replace('"../engines/b"', "5"), ["bundle: ", "valid path", "got 5"]),
        (GOOD.replace("[[camera]]", "[camera]"), ["camera: "]),
        (GOOD.split("\n[[", maxsplit=1)[0], ["camera: missing"]),
        ('camera = []\ndevice = "b"\nbundle = "b"', ["camera: ", "at least"]),
        (GOOD + '[[camera]]\nname = "door"\nsource = "1"', ["camera: ", "two cameras are named 'door'"]),
        # unknown keys, at every depth
        (GOOD + "[detekt]\niou = 1", ["detekt: unknown key; did you mean 'detect'?"]),
        (
            GOOD + "[quux]",
            ["quux: unknown key; known keys: bundle, camera, crop, detect, device, health, load, match"],
        ),
        (GOOD + "[detect]\nthresold = 1", ["detect.thresold: unknown key; did you mean 'threshold'?"]),
        (GOOD + "[detect]\nquux = 1", ["detect.quux: unknown key; known keys: iou, overlap, threshold"]),
        (GOOD.replace("name =", "nmae ="), ["camera.0.nmae: unknown key (and 1 more); did you mean 'name'?"]),
        (
            GOOD + '[[camera]]\nname = "b"\nsorce = "1"',
            ["camera.1.sorce: unknown key (and 1 more); did you mean 'source'?"],
        ),
        (GOOD + "[detect]\niou = 5\nthresold = 1", ["detect.thresold: unknown key (and 1 more)"]),
        ("quux = " + "[" * 90 + "]" * 90, ["quux: unknown key"]),
        # wrong values
        (GOOD + "[detect]\nthreshold = true", ["detect.threshold: ", "valid number", "got True"]),
        (GOOD + '[detect]\nthreshold = "0.5"', ["detect.threshold: ", "valid number", "got '0.5'"]),
        (GOOD + "[detect]\nthreshold = nan", ["detect.threshold: ", "finite number", "got nan"]),
        (GOOD + "[detect]\niou = -inf", ["detect.iou: ", "finite number", "got -inf"]),
        (GOOD + "[detect]\niou = 1e999", ["detect.iou: ", "finite number"]),
        (GOOD + "[detect]\niou = -0.1", ["detect.iou: ", "greater than or equal to 0", "got -0.1"]),
        (GOOD + "[detect]\niou = 1.1", ["detect.iou: ", "less than or equal to 1", "got 1.1"]),
        (GOOD + '[detect]\noverlap = "NMS"', ["detect.overlap: ", "'nms' or 'merge'", "got 'NMS'"]),
        (GOOD + "[crop]\nmin_height = 24.0", ["crop.min_height: ", "valid integer", "got 24.0"]),
        (GOOD + "[crop]\nmin_height = 0", ["crop.min_height: ", "greater than or equal to 1", "got 0"]),
        (GOOD + "[crop]\nmax_per_frame = 0", ["crop.max_per_frame: ", "greater than or equal to 1"]),
        (GOOD + "[crop]\nmargin = 0.1", ["crop.margin: unknown key", "[look] margin of the prompt file"]),
        (GOOD + "[match]\ntop_k = 0", ["match.top_k: ", "greater than or equal to 1"]),
        (GOOD + '[match]\nsensitive = "gender"', ["match.sensitive: ", "got 'gender'"]),
        (GOOD + "[match]\nsensitive = [1]", ["match.sensitive.0: ", "valid string", "got 1"]),
        (GOOD + '[publish]\naddress = "udp://x:1"', ["publish.address: ", "tcp", "ipc", "got 'udp://x:1'"]),
        (GOOD + '[publish]\naddress = "tcp://"', ["publish.address: "]),
        (GOOD + "[publish]\nqueue = 0", ["publish.queue: ", "greater than or equal to 1"]),
        (GOOD + "[publish]\nlinger_ms = -1", ["publish.linger_ms: ", "greater than or equal to 0"]),
        (GOOD + '[publish]\ntransport = "udp"', ["publish.transport: ", "'acknowledged' or 'push'"]),
        (GOOD + "[spool]\nmax_bytes = 1000", ["spool.max_bytes: ", "greater than or equal to 1048576"]),
        (GOOD + '[spool]\nfsync = "always"', ["spool.fsync: ", "'event', 'interval' or 'never'"]),
        (GOOD + "[spool]\nfsync_ms = 0", ["spool.fsync_ms: ", "greater than or equal to 1"]),
        (GOOD + "[publish]\ncrops = 1", ["publish.crops: ", "valid boolean", "got 1"]),
        (GOOD + '[runtime]\nbackend = "cuda"', ["runtime.backend: ", "'onnxruntime'", "got 'cuda'"]),
        (GOOD + "[runtime]\nthreads = -1", ["runtime.threads: ", "greater than or equal to 0"]),
        (GOOD + "[load]\nhot_c = 70", ["load.cool_c: ", "below hot_c, 70.0, got 80.0"]),
        (GOOD + "[load]\ncool_c = 90", ["load.cool_c: ", "below hot_c, 90.0, got 90.0"]),
        (GOOD + '[load]\nhot_c = "hot"', ["load.hot_c: ", "valid number"]),
        ("detect = 5\n" + GOOD, ["detect: ", "DetectConfig"]),
        # no TOML at all
        ("device = ", ["not TOML: "]),
        (GOOD + 'device = "twice"\n[detect]\n[detect]', ["not TOML: "]),
        ("{}", ["not TOML: "]),
        (b"\xff\xfe" + GOOD.encode("utf-16-le"), ["not UTF-8 text"]),
        (GOOD.replace("box", "böx").encode("latin-1"), ["not UTF-8 text"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["not UTF-8 text"]),
        (GOOD + "\0", ["not TOML: "]),
        ("quux = " + "[" * 100_000, ["nested too deeply"]),
        ("quux = " + "9" * 5_000, ["not TOML"]),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(text: str | bytes, parts: list[str], path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_edge_config(written(path, text))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message
    assert len(message.splitlines()) == 1
    assert "pydantic" not in message


@pytest.mark.parametrize(
    "wrong",
    [
        'camera = "{url}"', 'camera = ["{url}"]', '[[camera]]\nname = "a"\nsource = "0"\nzone = "{url}"',
        '[[camera]]\n"{url}" = 1', '[[camera]]\nname = "a"\nsource = "0"\n[health]\naddress = "{url}"',
    ],
)  # fmt: skip
def test_no_mistake_shows_a_password(wrong: str, path: Path) -> None:
    """What is refused by a reload goes into events, too."""
    url = "rtsp://me:se/cret@10.0.0.5/main"
    with pytest.raises(ConfigError) as error:
        read_edge_config(written(path, f'device = "box"\nbundle = "b"\n{wrong.format(url=url)}\n'))
    assert "cret" not in str(error.value)


def test_a_file_that_is_not_for_this_user_is_the_operators_mistake(path: Path) -> None:
    """As where root put it there: no fault of the command line (2), which would be tried again and again."""
    path.touch(0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"edge\.toml: Permission denied; by hand use sudo"):
            read_edge_config(path)
    finally:
        if root:
            os.seteuid(0)
    paths = [
        one.type for command in main.commands.values() for one in command.params if isinstance(one.type, click.Path)
    ]
    assert paths
    assert not any(kind.readable for kind in paths), "click would say that"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path}: {reason}"):
            read_edge_config(path)


@pytest.mark.parametrize("size", [2**31, 10**12, 10**30])
@pytest.mark.parametrize("key", ["publish.queue", "publish.linger_ms", "runtime.threads"])
def test_a_number_that_zeromq_or_the_runtime_cannot_take_is_refused_here(key: str, size: int, path: Path) -> None:
    """Passed on, a linger of 2**31 ms would end the run in an OverflowError and a process that never ends."""
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key}: Input should be less than or equal to"):
        read_edge_config(written(path, f"{GOOD}[{section}]\n{name} = {size}\n"))


def _accepts(model: type[Settings], **fields: Any) -> bool:
    try:
        model(**fields)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("tcp://127.0.0.1:5577", True),
        ("tcp://collector.example:1", True),
        ("tcp://collector:65535", True),
        ("tcp://[::1]:5577", True),
        ("ipc:///run/lookout.sock", True),
        ("tcp://collector", False),
        ("tcp://collector:", False),
        ("tcp://:5577", False),
        ("tcp://collector:0", False),
        ("tcp://collector:65536", False),  # ZeroMQ would take it for port 0
        ("tcp://127.0.0.1:71113", False),  # and this for 5577
        ("tcp://collector:five", False),
        ("tcp://two words:5577", False),
        ("inproc://x", False),
        ("127.0.0.1:5577", False),
        ("xtcp://127.0.0.1:5577", False),
        ("tcp://127.0.0.1:5577\n", False),
        ("ipc://", False),
    ],
)
def test_an_address_that_could_not_be_reached_is_refused_before_the_run(address: str, good: bool) -> None:
    assert _accepts(PublishConfig, address=address) == good


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("127.0.0.1:9477", True),
        ("0.0.0.0:65535", True),
        ("localhost:0", True),
        ("[::1]:9477", True),
        ("", True),
        ("9477", False),
        (":9477", False),
        ("127.0.0.1", False),
        ("127.0.0.1:", False),
        ("127.0.0.1:65536", False),
        ("127.0.0.1:-1", False),
        ("::1:9477", False),
        ("http://127.0.0.1:9477", False),
        ("two words:9477", False),
        ("127.0.0.1:9477\n", False),
        (" ", False),
    ],
)
def test_where_a_box_tells_how_it_is(address: str, good: bool, path: Path) -> None:
    assert _accepts(HealthConfig, address=address) == good
    if not good:
        with pytest.raises(ConfigError, match=r"health\.address: should be host:port, .* or '' for nowhere: got "):
            read_edge_config(written(path, f"{GOOD}[health]\naddress = {json.dumps(address)}\n"))


def test_any_model_can_be_read(path: Path) -> None:
    assert read_toml(written(path, "threads = 2"), RuntimeConfig).threads == 2
    with pytest.raises(ConfigError, match=r"edge\.toml: treads: unknown key; did you mean 'threads'"):
        read_toml(written(path, "treads = 2"), RuntimeConfig)
