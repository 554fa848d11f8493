"""Cameras, video files and folders of images become Frames; a live camera reconnects, and its latest frame wins."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any

from edge.address import shown
from edge.config import CameraConfig, Decoder, is_url_or_device
from edge.decoders import Decoders
from edge.errors import CaptureError, LookoutError
from edge.failpoints import failpoint
from edge.footage import open_footage
from edge.live import BEAT, Live
from edge.pace import Pace
from edge.schedule import Schedule
from edge.steps import Phase, Step, Steps
from edge.values import Frame

__all__ = ["CameraState", "Cameras", "Phase"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0  # how long close() waits; a thread that hangs in a dead camera's read is left behind
URLS = ("rtsp://", "rtsps://", "http://", "https://")


@dataclass(frozen=True)
class CameraState:
    """How one camera does.

    live: no file or folder. phase: starting, no picture yet; up, pictures come; away, it is called in vain; frozen,
    pictures come and show the same to the last bit; off, outside its schedule; ended, read to its end, or given up.
    frames: captured so far. drops: by reason, those that never left here: "replaced" by a newer one before anyone took
    them, "paced" as more than wanted, "unreadable" (these are no frames). reconnects: connections after the first.
    error: the latest, also when it is over. frame_at: time.monotonic() of the latest picture. beat_at: of the latest
    sign of life of the thread that reads it, be it an attempt, a picture or a wait; there is none after the end.
    """

    name: str
    live: bool = True
    phase: Phase = "starting"
    frames: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)
    reconnects: int = 0
    error: str | None = None
    frame_at: float | None = None
    beat_at: float = field(default_factory=time.monotonic)

    @property
    def connected(self) -> bool:
        """The latest attempt to read gave a picture, and it was not the same one as ever."""
        return self.phase == "up"

    @property
    def dropped(self) -> int:
        """For any reason."""
        return sum(self.drops.values())

    @property
    def offered(self) -> int:
        """Frames that could be taken; of a slow pace there may be none for minutes."""
        return self.frames - self.drops.get("paced", 0)

    @property
    def taken(self) -> int:
        """Those that were, and one that may still wait."""
        return self.offered - self.drops.get("replaced", 0)


@dataclass(eq=False)
class _Camera:
    """What a camera's thread and the taker of its frames share, guarded by the condition of Cameras."""

    config: CameraConfig
    state: CameraState
    pace: Pace = field(default_factory=Pace)
    frame: Frame | None = None  # captured, not yet taken
    stopped: bool = False  # its thread is to end
    ended: bool = False  # it has

    def note(self, **changes: Any) -> None:
        self.state = replace(self.state, beat_at=time.monotonic(), **changes)

    def drop(self, reason: str) -> None:
        self.note(drops={**self.state.drops, reason: self.state.drops.get(reason, 0) + 1})


class Cameras:
    """Several sources at once, each read by a thread of its own; a context manager.

    Files and folders wait until a frame is taken, so that every frame is delivered. Live cameras do not wait: of them
    the newest frame is kept, and numbers that are missing were dropped.

    failures: what ended a source before its time; complete once `done`.
    """

    def __init__(
        self,
        configs: Sequence[CameraConfig],
        *,
        timeout: float = 10.0,
        decoder: Decoder = "auto",
        today: Callable[[], datetime] = datetime.now,
    ) -> None:
        """timeout: seconds after which a silent network camera is given up and called anew. decoder: of rtsp:// ones.
        today: the box's local time, which schedules follow; files have none.

        Raises CaptureError where a video or folder cannot be read; live cameras may be away. Raises ConfigError where
        the decoder asked for is not here.
        """
        self.failures: list[CaptureError] = []
        self._timeout, self._today, self._decoders = timeout, today, Decoders(decoder)
        self._changed = threading.Condition()
        self._closed = self._entered = False
        self._max_fps: float | None = None
        self._threads: list[threading.Thread] = []
        self._cameras: list[_Camera] = []
        self._waiting: dict[_Camera, Steps] = {}  # those without a thread yet
        self.replace(configs)

    def __enter__(self) -> Cameras:
        self._entered = True
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every source, within CLOSE_SECONDS. Frames not yet taken are gone."""
        with self._changed:
            self._closed = True
            for camera in self._cameras:
                camera.frame, camera.stopped = None, True
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._threads:
            self._threads.pop().join(max(0.0, deadline - time.monotonic()))

    def replace(self, configs: Sequence[CameraConfig]) -> None:
        """From now on these. Those whose source and schedule are as before go on untouched, the others end or begin.

        Raises CaptureError where a new video or folder cannot be read, ConfigError where the decoder asked for is not
        here; then nothing has changed.
        """
        before = {camera.config.name: camera for camera in self._cameras}
        cameras, new = [], {}
        try:
            for config in configs:
                camera = before.get(config.name)
                if camera and (camera.config.source, camera.config.schedule) == (config.source, config.schedule):
                    cameras.append(camera)
                    continue
                camera = _Camera(config, CameraState(config.name, is_url_or_device(config.source)))
                camera.pace.max_fps = self._max_fps
                try:
                    new[camera] = self._opened(camera)
                except CaptureError as error:
                    raise CaptureError(f"camera {config.name!r}: {error}") from error
                cameras.append(camera)
        except LookoutError:
            for steps in new.values():
                steps.close()
            raise
        with self._changed:
            for camera in self._cameras:
                if camera not in cameras:
                    camera.frame, camera.stopped = None, True
            self._cameras = cameras
            self._waiting.update(new)
            self._changed.notify_all()
        if self._entered:
            self._start()

    def pace(self, max_fps: float | None) -> None:
        """Take about so many frames per second of each live camera; None takes all. The others are hardly any work."""
        with self._changed:
            self._max_fps = max_fps
            for camera in self._cameras:
                camera.pace.max_fps = max_fps

    def next(self, timeout: float) -> list[Frame]:
        """What is there, at most one frame of each camera; waits up to `timeout` seconds for the first.

        Empty where none came in time, and at once when there is nothing to wait for.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.done or any(c.frame for c in self._cameras), timeout)
            frames = [camera.frame for camera in self._cameras if camera.frame]
            for camera in self._cameras:
                camera.frame = None
            self._changed.notify_all()
            return frames

    @property
    def done(self) -> bool:
        """True when every source has ended and every frame was taken; a live camera does not end."""
        with self._changed:
            return all(camera.ended and not camera.frame for camera in self._cameras)

    @property
    def states(self) -> list[CameraState]:
        """One per camera, in the order of the configuration."""
        with self._changed:
            return [camera.state for camera in self._cameras]

    def _opened(self, camera: _Camera) -> Steps:
        """The source of a camera. Raises CaptureError where a file or folder has no pictures."""
        source = camera.config.source
        if not camera.state.live:
            return open_footage(source)
        if not source.isdecimal() and not source.startswith(URLS):
            raise CaptureError(f"{shown(source)}: unknown kind of address", expected=" or ".join(URLS))
        call = self._decoders.of(camera.config.name, source)
        schedule = Schedule.parse(camera.config.schedule)
        return Live(
            partial(call, source, self._timeout),
            shown(source),
            timeout=self._timeout,
            pace=camera.pace,
            is_open=lambda: not schedule.hours or schedule.open_at(self._today()),
            wait=partial(self._wait, camera),
        ).steps()

    def _start(self) -> None:
        for camera, steps in self._waiting.items():
            # A daemon, as a read from a dead camera may outlast the program's wish to end.
            target = partial(self._run, camera, steps)
            thread = threading.Thread(target=target, name=camera.state.name, daemon=True)
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(thread)
            thread.start()
        self._waiting.clear()

    def _run(self, camera: _Camera, steps: Steps) -> None:
        """The body of a camera's thread."""
        failure = None
        try:
            for step in steps:
                failpoint("box.capture")
                self._note(camera, step)
                if camera.stopped:
                    break
        except CaptureError as error:
            failure = CaptureError(f"camera {camera.state.name!r}: {error}")
        except Exception as error:  # whatever it is: a thread that dies must not look like a quiet camera
            failure = CaptureError(f"camera {camera.state.name!r}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        steps.close()
        if failure:
            logger.warning("%s", failure, extra={"camera": camera.state.name})
        with self._changed:
            if failure:
                self.failures.append(failure)
                camera.note(error=str(failure))
            camera.note(phase="ended")
            camera.ended = True
            self._changed.notify_all()

    def _note(self, camera: _Camera, step: Step) -> None:
        """Tell what a camera's thread did."""
        with self._changed:
            if camera.stopped:  # nobody wants to hear of it any more
                return
            before = camera.state
            camera.note(phase=step.phase)
            if step.begins and before.frames:
                camera.note(reconnects=before.reconnects + 1)
            if step.error:
                camera.note(error=str(step.error))
            if step.dropped:
                camera.drop(step.dropped)
            if step.picture or step.dropped == "paced":
                camera.note(frames=before.frames + 1, frame_at=time.monotonic())
            if step.picture:
                self._offer(camera, Frame(before.name, before.frames, *step.picture))
        self._log(camera.state, before.phase, step)

    def _offer(self, camera: _Camera, frame: Frame) -> None:
        """Put a frame where next() finds it; the caller holds the condition."""
        if not camera.state.live:
            while not self._changed.wait_for(lambda: camera.stopped or not camera.frame, BEAT):
                camera.note()
        if camera.stopped:
            return
        if camera.frame:
            camera.drop("replaced")
        camera.frame = frame
        self._changed.notify_all()

    def _log(self, state: CameraState, before: Phase, step: Step) -> None:
        extra = {"camera": state.name}
        if step.error:
            logger.warning("camera %r: %s", state.name, step.error, extra=extra)
        if not state.live:
            return
        if step.begins:
            logger.info("camera %r: connected", state.name, extra=extra)
        elif before == "frozen" and state.phase == "up":
            logger.info("camera %r: its picture moves again", state.name, extra=extra)
        elif state.phase == "off" and before != "off":
            logger.info("camera %r: closed, by its schedule", state.name, extra=extra)

    def _wait(self, camera: _Camera, seconds: float) -> bool:
        """Pause a live camera's thread. False when it is time to stop."""
        with self._changed:
            return not self._changed.wait_for(lambda: camera.stopped, seconds)
