"""One soak: a box before four cameras, its collector, faults by a plan, and what both took all the while."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.proxy import Fault as WireFault
from tests.chaos.proxy import Proxy, held_port
from tests.soak.cameras import four_cameras
from tests.soak.plan import BOX, Fault, plan_from_seed

ROOT = Path(__file__).parents[2]
EVERY = 2.0  # s between two samples
SAY = 30.0  # s between two lines of progress
FRESH = 3.0  # s: a picture of a camera with 4 frames a second that works
RECOVERED = 60.0  # s: the longest pause between two attempts is 30, and an attempt may take 10
START, STOP = 60.0, 120.0  # s until a program is ready, or has ended and delivered all
MAX_FPS = 2.0

Say = Callable[[str], None]


class SoakError(Exception):
    """A soak that could not be done: something did not start, or not end."""


@dataclass(frozen=True)
class Usage:
    """Of a process. memory: resident, bytes."""

    pid: int
    memory: int
    files: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """At a second of the soak; None where there was no process. ages: seconds since each camera's latest picture."""

    second: float
    box: Usage | None
    collector: Usage | None
    ages: Mapping[str, float | None]
    phases: Mapping[str, str]


@dataclass
class Recovery:
    """Of a camera after a fault. seconds: until its pictures came again; None: not yet. phases: seen meanwhile."""

    fault: Fault
    ended: float
    seconds: float | None = None
    phases: set[str] = field(default_factory=set)


@dataclass
class Outcome:
    """What a soak saw. unwell: times at which the box did not answer, or said that it hangs. drops: by camera, why."""

    seed: int
    faults: Sequence[Fault]
    samples: list[Sample] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    unwell: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    drops: dict[str, Mapping[str, int]] = field(default_factory=dict)
    described: int = 0
    delivered: int = 0
    waiting: int = 0
    stored: int = 0
    gaps: str = ""

    def wrong(self) -> list[str]:
        """What was not as it should be, a line each; the slopes are judged by others."""
        late = [one for one in self.recoveries if one.seconds is None or one.seconds > RECOVERED]
        found = [f"{one.fault}: no picture within {RECOVERED:.0f} s after it" for one in late]
        found += self.ended + self.unwell[:10]
        if self.gaps:
            found.append(f"events are missing: {self.gaps[:500]}")
        # what was kept when the collector was stopped before it could say so is not among those delivered
        if self.waiting or self.stored < max(self.delivered, self.described):
            found.append(
                f"{self.described} frames described, {self.delivered} events delivered, {self.waiting} wait, "
                f"{self.stored} stored"
            )
        return found


class Program:
    """`edge` or `collector` in a process of its own, which writes to a log; started anew where it is asked to."""

    def __init__(self, name: str, log: Path, *words: str) -> None:
        self.name, self.log = name, log
        self._words = [sys.executable, "-c", f"from {name}.cli import main; main()", *words]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._words, cwd=ROOT, stdout=log, stderr=log)

    @property
    def code(self) -> int | None:
        """Its exit code, once it has one."""
        assert self._process is not None
        return self._process.poll()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int) -> int:
        """Its exit code, after this signal."""
        self.signal(number)
        assert self._process is not None
        try:
            return self._process.wait(STOP)
        except subprocess.TimeoutExpired as error:
            raise SoakError(f"the {self.name} did not end within {STOP:.0f} s") from error

    def usage(self) -> Usage | None:
        assert self._process is not None
        with suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            with process.oneshot():
                return Usage(process.pid, process.memory_info().rss, process.num_fds(), process.num_threads())
        return None

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Soak:
    """Does a plan. Called once."""

    def __init__(self, folder: Path, bundle: Path, seed: int, seconds: float, rtsp: bool, say: Say) -> None:
        self._folder, self._bundle, self._seconds, self._rtsp, self._say = folder, bundle, seconds, rtsp, say
        self._seed = seed
        self._removed: set[str] = set()
        self._wrong: set[str] = set()  # kinds of BOX that are on
        self._began = 0.0

    def __call__(self) -> Outcome:
        with ExitStack() as kept:
            pictures = self._folder / "pictures"
            pictures.mkdir()
            self._cameras = four_cameras(pictures, self._rtsp, kept)
            held = kept.enter_context(held_port())
            port = int(held.getsockname()[1])
            self._wire = kept.enter_context(Proxy(port, self._seed))
            store = self._folder / "results.db"
            words = ("run", "--bind", f"tcp://127.0.0.1:{port}", "--store", str(store))
            self._collector = Program("collector", self._folder / "collector.log", *words)
            self._box = Program("edge", self._folder / "box.log", "run", "--config", str(self._config))
            for program in (self._collector, self._box):
                kept.callback(program.kill)
            self._write()
            self._collector.start()
            self._box.start()
            self._health = self._address()
            self._until_ready()
            kinds = {name: camera.kinds for name, camera in self._cameras.items()}
            outcome = Outcome(self._seed, plan_from_seed(self._seed, self._seconds, kinds))
            self._began = time.monotonic()
            self._go(outcome)
            self._finish(outcome, store)
        return outcome

    @property
    def _config(self) -> Path:
        return self._folder / "edge.toml"

    def _write(self) -> None:
        """The configuration as the faults that are on have it."""
        zone = '[[camera.zone]]\nname = "left"\npolygon = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]\n'
        cameras = "".join(
            f'[[camera]]\nname = "{name}"\nsource = "{camera.url}"\n{zone if "zoned" in self._wrong else ""}'
            for name, camera in self._cameras.items()
            if name not in self._removed
        )
        bad = "nonsense = 1\n" if "bad-config" in self._wrong else ""
        self._config.write_text(
            f'device = "soak"\nbundle = "{self._bundle}"\n{bad}{cameras}'
            f'[publish]\naddress = "tcp://127.0.0.1:{self._wire.port}"\nlinger_ms = 60000\n'
            f'[spool]\npath = "spool.db"\n[health]\naddress = "127.0.0.1:0"\n[runtime]\nthreads = 1\n'
            f"[load]\nmax_fps = {MAX_FPS}\n[motion]\nenabled = true\n"
        )

    def _address(self) -> str:
        end = time.monotonic() + START
        while not (found := re.search(r"health at (http://\S+)", self._box.log.read_text())):
            self._wait_for_start(end)
        return found[1]

    def _until_ready(self) -> None:
        end = time.monotonic() + START
        while (status := self._status()) is None or not status["ready"]["good"]:
            self._wait_for_start(end)

    def _wait_for_start(self, end: float) -> None:
        if self._box.code is not None or time.monotonic() > end:
            raise SoakError(f"the box did not start:\n{self._box.log.read_text()[-3000:]}")
        time.sleep(0.05)

    def _status(self) -> dict[str, Any] | None:
        with suppress(OSError, ValueError), urllib.request.urlopen(f"{self._health}/status", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
        return None

    # ---- the run

    def _go(self, outcome: Outcome) -> None:
        steps = sorted(
            [(one.at, True, one) for one in outcome.faults] + [(one.ends, False, one) for one in outcome.faults],
            key=lambda step: step[0],
        )
        sampled = said = -1000.0
        while (now := time.monotonic() - self._began) < self._seconds:
            while steps and steps[0][0] <= now:
                _, begins, fault = steps.pop(0)
                (self._begin if begins else self._end)(fault, outcome)
            if now >= sampled + EVERY:
                sampled = now
                self._sample(outcome, now)
            if now >= said + SAY:
                said = now
                self._tell(outcome, now)
            if (code := self._box.code) is not None:
                outcome.ended.append(f"the box ended by itself with exit code {code} after {now:.0f} s")
                return
            time.sleep(0.1)

    def _begin(self, fault: Fault, outcome: Outcome) -> None:
        if fault.target in self._cameras:
            self._cameras[fault.target].begin(fault.kind, fault.seconds)
            if fault.kind == "removed":
                self._removed.add(fault.target)
                self._reload()
        elif fault.target == "collector":
            gently = fault.kind == "stop"
            code = self._collector.end(signal.SIGTERM if gently else signal.SIGKILL)
            if code != (0 if gently else -signal.SIGKILL):
                outcome.ended.append(f"the collector ended with exit code {code} where it was told to {fault.kind}")
        elif fault.kind in BOX:
            self._wrong.add(fault.kind)
            self._reload()
        else:
            self._wire.begin(WireFault(fault.kind, seconds=fault.seconds))  # type: ignore[arg-type]

    def _end(self, fault: Fault, outcome: Outcome) -> None:
        if fault.target in self._cameras:
            self._cameras[fault.target].end(fault.kind)
            if fault.kind == "removed":
                self._removed.discard(fault.target)
                self._reload()
            outcome.recoveries.append(Recovery(fault, time.monotonic() - self._began))
        elif fault.target == "collector":
            self._collector.start()
        elif fault.kind in BOX:
            self._wrong.discard(fault.kind)
            self._reload()

    def _reload(self) -> None:
        self._write()
        self._box.signal(signal.SIGHUP)

    def _sample(self, outcome: Outcome, now: float) -> None:
        status = self._status()
        if status is None:
            outcome.unwell.append(f"after {now:.0f} s the box did not answer")
        elif not status["live"]["good"]:
            outcome.unwell.append(f"after {now:.0f} s: {' '.join(status['live']['lines'])}")
        cameras = {one["name"]: one for one in status["cameras"]} if status else {}
        ages = {name: one["frame_age_s"] for name, one in cameras.items()}
        phases = {name: one["phase"] for name, one in cameras.items()}
        outcome.samples.append(Sample(now, self._box.usage(), self._collector.usage(), ages, phases))
        outcome.drops.update({name: one["drops"] for name, one in cameras.items()})
        outcome.described = sum(one["described"] for one in cameras.values()) or outcome.described
        for one in outcome.recoveries:
            age, phase = ages.get(one.fault.target), phases.get(one.fault.target)
            if one.seconds is None and phase:
                if phase == "up" and age is not None and age < min(FRESH, now - one.ended):
                    one.seconds = now - one.ended
                else:
                    one.phases.add(phase)

    def _tell(self, outcome: Outcome, now: float) -> None:
        last = outcome.samples[-1]
        on = [str(fault) for fault in outcome.faults if fault.at <= now < fault.ends]
        takes = [
            f"{name} {usage.memory / 2**20:.0f} MiB, {usage.files} files, {usage.threads} threads"
            for name, usage in (("box", last.box), ("collector", last.collector))
            if usage
        ]
        self._say(f"{now:6.0f} s  {'; '.join(takes)}; {', '.join(on) or 'no fault'}")

    # ---- the end

    def _finish(self, outcome: Outcome, store: Path) -> None:
        self._wire.calm()
        if self._box.code is None:
            for name, program in (("box", self._box), ("collector", self._collector)):
                if code := program.end(signal.SIGTERM):
                    outcome.ended.append(f"the {name} ended with exit code {code} where it was told to stop")
        else:
            self._collector.end(signal.SIGTERM)
        said = self._box.log.read_text()
        if found := re.search(r"(\d+) events delivered, (\d+) wait", said):
            outcome.delivered, outcome.waiting = int(found[1]), int(found[2])
        starts = said.count("health at http://")
        if starts != 1:
            outcome.ended.append(f"the box started {starts} times")
        if "Traceback" in said:
            outcome.ended.append("a traceback in the box's log")
        outcome.gaps = self._asked("gaps", store)
        outcome.stored = json.loads(self._asked("stats", store))["total"]["events"]

    def _asked(self, what: str, store: Path) -> str:
        words = [sys.executable, "-c", "from collector.cli import main; main()", what, "--json", str(store)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=STOP, check=False)
        if done.returncode:
            raise SoakError(f"collector {what}: exit code {done.returncode}: {done.stderr}")
        return done.stdout
