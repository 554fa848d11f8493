"""What the operator chooses: the models of configs/edge.toml, and how any TOML file becomes a checked model."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from edge.address import shown
from edge.errors import ConfigError
from edge.schedule import Schedule
from edge.values import Backend
from edge.zones import flaw_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Overlap = Literal["nms", "merge"]
Transport = Literal["acknowledged", "push"]
Fsync = Literal["event", "interval", "never"]
Telling = Literal["every-frame", "changes"]
Decoder = Literal["auto", "gstreamer", "ffmpeg"]
MOVED = {"crop.margin": "it is [look] margin of the prompt file since 0.3"}  # keys that were, and where they went
Fraction = Annotated[float, Field(ge=0, le=1)]
Corner = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # TOML has lists


class Settings(BaseModel):
    """Base of every model that a TOML file fills: frozen, no unknown keys, no NaN."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ZoneConfig(Settings):
    """One [[camera.zone]]."""

    name: str = Field(min_length=1, max_length=200, description="what it is called, for people")
    polygon: tuple[Corner, ...] = Field(
        strict=False,
        min_length=3,
        description="its corners [x, y] in order, in 0..1 of the picture's width and height from the top left",
    )

    @field_validator("polygon")
    @classmethod
    def _sound(cls, polygon: tuple[Corner, ...]) -> tuple[Corner, ...]:
        if flaw := flaw_of(polygon):
            raise ValueError(f"should be the outline of one area, but {flaw}")
        return polygon


class CameraConfig(Settings):
    """One [[camera]]."""

    name: str = Field(min_length=1, max_length=200, description="its name in events; unique on the box")
    source: str = Field(
        min_length=1,
        description="a video file, a folder of images, rtsp:// or http(s):// URL, or a device number such as '0'; "
        "paths are relative to this file",
    )
    schedule: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='when it is looked at, by the box\'s local time, like "Mon-Fri 07:00-19:00" or '
        '"22:00-06:00"; without one, always',
    )
    zone: tuple[ZoneConfig, ...] = Field(
        default=(),
        strict=False,
        description="one [[camera.zone]] per zone: only people with their feet in one count",
    )

    @field_validator("schedule")
    @classmethod
    def _hours(cls, schedule: tuple[str, ...]) -> tuple[str, ...]:
        Schedule.parse(schedule)
        return schedule


class DetectConfig(Settings):
    """[detect]: which boxes are people. The defaults are the paper's."""

    threshold: Fraction = Field(default=0.5, description="a box counts when its score is greater")
    iou: Fraction = Field(default=0.5, description="two boxes are one person when their IoU is greater")
    overlap: Overlap = Field(default="nms", description="nms keeps the best box, merge the union of all (the paper's)")


class TrackConfig(Settings):
    """[track]: who is who from frame to frame."""

    enabled: bool = Field(
        default=True, description="false describes every frame for itself, as those of a folder of images always are"
    )
    low: Fraction = Field(
        default=0.3,
        description="a box with a score above it may continue a track, though only a person above detect.threshold "
        "begins one, or is told of",
    )
    match_iou: Fraction = Field(
        default=0.1,
        description="IoU with the place expected that makes a person one of those before; between two frames "
        "their motion may, too",
    )
    lost_s: float = Field(
        default=3.0,
        gt=0,
        le=3600,
        description="seconds that a person out of sight is waited for; a longer pause of the camera ends every track",
    )
    min_frames: int = Field(
        default=3,
        ge=1,
        description="frames a track is seen in before it is waited for; until then it chooses last",
    )
    look_every: int = Field(
        default=10,
        ge=1,
        description="frames after which a person is encoded again; one who has come closer or is clearly better to see "
        "is at once",
    )
    publish: Telling = Field(
        default="every-frame",
        description="every-frame: an event per frame with everybody in it; changes: only where someone is new, the "
        "answers about someone changed, or a track ended, and only those people",
    )


class CropConfig(Settings):
    """[crop]: what of a person the encoder sees."""

    min_height: int = Field(
        default=24, ge=1, description="px of the source frame; smaller people are counted, not described"
    )
    max_per_frame: int = Field(
        default=32,
        ge=1,
        description="people encoded of one frame, new and large ones first; the others are counted as skipped, so that "
        "a crowd does not hold up the box",
    )


class MatchConfig(Settings):
    """[match]: what is said of a person."""

    top_k: int = Field(default=3, ge=1, description="options reported per category")
    sensitive: tuple[str, ...] = Field(
        default=(), strict=False, description="categories the prompt file marks as sensitive that this box may answer"
    )


class MotionConfig(Settings):
    """[motion]: an empty scene need not be looked at."""

    enabled: bool = Field(
        default=False,
        description="true looks for people only while something moves, or somebody was there; a person who comes "
        "unnoticed is missed",
    )
    share: Fraction = Field(default=0.0005, description="of the picture that has to change to count as motion")
    hold_s: float = Field(default=5.0, gt=0, le=3600, description="seconds looked on after the last motion or person")


class LoadConfig(Settings):
    """[load]: how much the box may do, and what it gives up when that is too much."""

    max_fps: float = Field(
        default=10.0, gt=0, le=1000, description="frames described per second of each live camera; files are not held"
    )
    hot_c: float = Field(
        default=90.0,
        description="degrees Celsius of any part from which the box does less; also where it is throttled",
    )
    cool_c: float = Field(
        default=80.0, validate_default=True, description="degrees below which it does more again; less than hot_c"
    )

    @field_validator("cool_c")
    @classmethod
    def _cool_is_cooler(cls, cool_c: float, info: ValidationInfo) -> float:
        hot_c = info.data.get("hot_c")  # None where it was wrong itself
        if hot_c is not None and cool_c >= hot_c:
            raise ValueError(f"cool_c should be below hot_c, {hot_c}, got {cool_c}")
        return cool_c


class HealthConfig(Settings):
    """[health]: where the box tells how it is."""

    address: str = Field(
        default="127.0.0.1:9477",
        description="host:port of /livez, /readyz, /status and /metrics, for everybody who reaches it; '' is nowhere",
    )

    @field_validator("address")
    @classmethod
    def _can_be_listened_on(cls, address: str) -> str:
        place = re.fullmatch(r"(?:\[[^\s\[\]]+\]|[^\s:\[\]]+):([0-9]{1,5})", address)
        if address and not (place and int(place[1]) < 65536):
            raise ValueError("should be host:port, [host]:port for IPv6, with a port up to 65535, or '' for nowhere")
        return address


class PublishConfig(Settings):
    """[publish]: where results go."""

    address: str = Field(
        default="tcp://127.0.0.1:5577",
        description="the collector's address: tcp://host:port, or ipc:// and the path of a socket file",
    )
    transport: Transport = Field(
        default="acknowledged",
        description="acknowledged keeps every event on disk until the collector has it; push is a plain ZeroMQ PUSH "
        "for programs that are no Lookout collector: unencrypted, and what its queue cannot take is lost",
    )
    key: Path | None = Field(
        default=None,
        strict=False,
        description="this box's key file, from `edge keys new`, relative to this file; with it the wire is encrypted",
    )
    collector_key: str | None = Field(
        default=None, description="the collector's public key, as `collector keys new` prints it"
    )
    insecure: bool = Field(
        default=False, description="true sends to another machine without encryption, for anyone to read and forge"
    )
    linger_ms: int = Field(
        default=2000, ge=0, le=86_400_000, description="how long the end of a run waits for what is still to be sent"
    )
    queue: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="push only: events kept while nobody takes them; more are dropped and counted",
    )
    crops: bool = Field(default=False, description="true sends a JPEG of every person off the box")

    @field_validator("address")
    @classmethod
    def _reachable(cls, address: str) -> str:
        tcp = re.fullmatch(r"tcp://(?:\[\S+\]|[^\s:\[\]]+):([0-9]{1,5})", address)
        # ZeroMQ itself would take port 65537 for 1
        if not (0 < int(tcp[1]) < 65536 if tcp else re.fullmatch(r"ipc://\S.*", address)):
            raise ValueError("should be tcp://host:port with a port from 1 to 65535, or ipc://path")
        return address


class SpoolConfig(Settings):
    """[spool]: where events wait for the collector's word that it has them."""

    path: Path = Field(
        default=Path("spool.db"), strict=False, description="the file, relative to this one; made where it is missing"
    )
    max_bytes: int = Field(
        default=4 << 30, ge=1 << 20, description="of disk; beyond it the oldest events leave, and the collector is told"
    )
    max_age_s: int = Field(
        default=7 * 86_400,
        ge=1,
        description="seconds of running time; older events leave, and the collector is told",
    )
    fsync: Fsync = Field(
        default="interval",
        description="what a power cut may take: event, nothing; interval, the last fsync_ms; "
        "never, what the system had not written yet. A crash or kill of the program takes nothing",
    )
    fsync_ms: int = Field(default=200, ge=1, le=3_600_000, description="milliseconds between two writes to the disk")


class RuntimeConfig(Settings):
    """[runtime]: what executes the graphs."""

    backend: Backend = Field(
        default="auto",
        description="auto: tensorrt where the bundle has engines and there is an NVIDIA GPU, else onnxruntime",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads for one inference; 0 takes every core")
    decoder: Decoder = Field(
        default="auto",
        description="of rtsp:// cameras: gstreamer is the system's, ffmpeg OpenCV's own; auto: gstreamer where that "
        "has NVIDIA's decoder, else ffmpeg",
    )


class DescribeConfig(Settings):
    """What becomes of a frame, wherever it comes from and wherever the words go."""

    detect: DetectConfig = DetectConfig()
    track: TrackConfig = TrackConfig()
    crop: CropConfig = CropConfig()
    match: MatchConfig = MatchConfig()

    @property
    def low(self) -> float | None:
        """The score above which a box may continue a track; None where nobody is followed."""
        return self.track.low if self.track.enabled else None

    @field_validator("track")
    @classmethod
    def _low_is_low(cls, track: TrackConfig, info: ValidationInfo) -> TrackConfig:
        detect = info.data.get("detect")  # None where it was wrong itself
        # only where someone wrote it: whoever lowers the threshold below the default just has no low boxes
        if detect and "low" in track.model_fields_set and track.low > detect.threshold:
            raise ValueError(f"low should be at most detect.threshold, {detect.threshold}, got {track.low}")
        return track


class EdgeConfig(DescribeConfig):
    """configs/edge.toml."""

    device: str = Field(min_length=1, max_length=200, description="this box's name in events")
    bundle: Path = Field(strict=False, description="the bundle's folder, relative to this file")
    camera: tuple[CameraConfig, ...] = Field(strict=False, description="one [[camera]] per source")
    publish: PublishConfig = PublishConfig()
    spool: SpoolConfig = SpoolConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    motion: MotionConfig = MotionConfig()
    load: LoadConfig = LoadConfig()
    health: HealthConfig = HealthConfig()

    @field_validator("camera")
    @classmethod
    def _unique_names(cls, cameras: tuple[CameraConfig, ...]) -> tuple[CameraConfig, ...]:
        if not cameras:  # no min_length: where one camera is wrong, pydantic would also call the list too short
            raise ValueError("at least one [[camera]] is needed")
        for twice in repeated(camera.name for camera in cameras):
            raise ValueError(f"two cameras are named {twice!r}")
        return cameras


def read_edge_config(path: Path) -> EdgeConfig:
    """configs/edge.toml with its paths made relative to the working folder. Raises ConfigError."""
    config = read_toml(path, EdgeConfig)
    here = path.parent
    cameras = tuple(
        camera if is_url_or_device(camera.source) else camera.model_copy(update={"source": str(here / camera.source)})
        for camera in config.camera
    )
    spool = config.spool.model_copy(update={"path": here / config.spool.path})
    publish = config.publish
    if publish.key is not None:
        publish = publish.model_copy(update={"key": here / publish.key})
    return config.model_copy(
        update={"bundle": here / config.bundle, "camera": cameras, "spool": spool, "publish": publish}
    )


def is_url_or_device(source: str) -> bool:
    """True for rtsp://…, http://…, 0; false for a path."""
    return source.isdecimal() or bool(re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE))


Model = TypeVar("Model", bound=Settings)


def read_toml(path: Path, model: type[Model]) -> Model:
    """Read one TOML file into `model`.

    Raises ConfigError naming the file, the key, what is allowed and what was found, with a guess for a mistyped key.
    """
    try:
        data = path.read_bytes()
    except PermissionError as error:
        remedy = "by hand use sudo; on a box the service, which runs as lookout, has to read it, too"
        raise ConfigError(f"{path}: {error.strerror}", remedy=remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}") from error
    try:
        fields = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except ValueError as error:  # a TOMLDecodeError, or a number too long for int()
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _config_error(path, model, error) from error


def repeated(names: Iterable[str]) -> Iterator[str]:
    """Every name that stood there before."""
    seen = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _config_error(path: Path, model: type[Settings], error: ValidationError) -> ConfigError:
    # a mistyped key is also a missing one: its own error says more
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(shown(str(part)) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, first["loc"][:-1]))
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        guess = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        guess = MOVED.get(key, guess)
        return ConfigError(f"{path}: {key}: unknown key{more}", remedy=guess)
    if first["type"] == "missing":
        return ConfigError(f"{path}: {key}: missing{more}")
    if first["type"] == "tuple_type" and isinstance(first["input"], dict):
        return ConfigError(f"{path}: {key}: one table where several may stand{more}", remedy=f"write [[{key}]]")
    got = None if isinstance(first["input"], dict | list | tuple) else repr(first["input"])
    if isinstance(first["input"], str) and (key.startswith("camera") or "@" in first["input"]):
        got = repr(shown(first["input"]))  # a camera's address holds its password in the wrong place, too
    return ConfigError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}{more}", got=got)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> dict[str, FieldInfo]:
    """The fields of the model that lies at `location` within `model`."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = next(m for m in _models_in(model.model_fields[part].annotation))
    return model.model_fields


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
