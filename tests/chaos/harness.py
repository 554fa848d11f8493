"""One chaos run: a plan drawn from a seed, the processes it is done to, and the count at the end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from collector.keyring import allow, new_keyring
from collector.store import Store
from edge.config import Fsync
from edge.events import Event, Stamp, encode
from edge.failpoints import POINTS
from edge.keys import new_key
from tests.chaos.producer import DEVICE, END, event_of, read_record
from tests.chaos.proxy import LASTING, Fault, Kind, Proxy, held_port

ROOT = Path(__file__).parents[2]
POLL = 0.01  # s
SAY = 5.0  # s between two lines of progress
DIE = 90.0  # s until a fail point must have been reached; a box may first have to find out that a connection is dead
STOP = 30.0  # s until SIGTERM must have ended a process
NUDGE, NUDGES = 1.0, 10  # s without reaching a fail point after which so many events more are asked for
FSYNC: tuple[Fsync, ...] = ("event", "interval", "never")
AFTER = ((0.0, 0.3), (0.3, 2.0), (0.3, 2.0))  # s until a kill: at a start, or when all is at work
ROUNDS_OF = 0.8  # of the events; the others are for nudges and for the end
EVENTS_A_ROUND = 400  # about
TAIL = 3000  # characters of each log that a ChaosError tells

_COLLECTOR = (sys.executable, "-c", "from collector.cli import main; main()")
_PRODUCER = (sys.executable, "-m", "tests.chaos.producer")

Victim = Literal["box", "collector"]
Say = Callable[[str], None]


class ChaosError(Exception):
    """A run that could not be done as planned: something died, or did not, or took too long."""


class Card(NamedTuple):
    """Who dies in a round, and where."""

    victims: tuple[Victim, ...]
    gently: bool = False
    point: str = ""


def owner(point: str) -> Victim:
    """Whose fail point it is."""
    return "box" if point.startswith("box.") else "collector"


# decks to deal from: what happens in a round, how many faults, which
CARDS = (
    *(Card((owner(point),), point=point) for point in sorted(POINTS)),
    *(Card(("box",)), Card(("collector",)), Card(("box", "collector"))) * 2,
    *(Card(("box",), gently=True), Card(("collector",), gently=True), Card(()), Card(())),
)
COUNTS = (0, 1, 1, 2)
FAULTS: tuple[Kind, ...] = ("refuse", "delay", "reset", "cut") * 4 + ("blackhole", "half-open")  # these take long
BOTH = 0.2  # of the kills before a fail point, the other one too


@dataclass(frozen=True)
class Round:
    """What is done within a few seconds.

    `events` more are produced at `rate` a second (0: as fast as it goes) while `faults` happen; after `after` seconds
    the victims die (`gently`: by SIGTERM) and are started again. With a `point`, its owner is started such that it dies
    there at its `times`-th time, and then once more without.
    """

    events: int
    rate: float
    faults: tuple[Fault, ...]
    after: float
    victims: tuple[Victim, ...]
    gently: bool = False
    point: str = ""
    times: int = 1

    def __str__(self) -> str:
        done = [f"{fault.kind} at {fault.after:.1f} s" for fault in self.faults]
        if self.victims:
            done.append(f"{'SIGTERM' if self.gently else 'kill -9'} {' and '.join(self.victims)} at {self.after:.1f} s")
        if self.point:
            done.append(f"{self.point}:{self.times}")
        return ", ".join(done) or "nothing"


@dataclass(frozen=True)
class Plan:
    """All that chance decides."""

    seed: int
    events: int
    curve: bool
    fsync: Fsync
    rounds: tuple[Round, ...]


def plan_from_seed(seed: int, events: int) -> Plan:
    """The same for the same arguments. Every fail point, every kind of fault and every kind of kill is in it."""
    chance = random.Random(seed)
    kinds, counts, cards = _dealt(chance, FAULTS), _dealt(chance, COUNTS), _dealt(chance, CARDS)
    number = max(len(CARDS), events // EVENTS_A_ROUND)
    each = int(ROUNDS_OF * events) // number

    def fault() -> Fault:
        kind, after = next(kinds), chance.uniform(0, 1)
        if kind in LASTING:
            return Fault(kind, after, seconds=chance.uniform(0.3, 2))
        return Fault(kind, after, chunks=chance.choice((0, chance.randrange(30))))

    def drawn(card: Card) -> Round:
        both = card.point and chance.random() < BOTH
        return Round(
            events=each,
            rate=chance.choice((0.0, chance.uniform(100, 1000))),
            faults=tuple(fault() for _ in range(next(counts))),
            after=chance.uniform(*chance.choice(AFTER)),
            victims=("box", "collector") if both else card.victims,
            gently=card.gently,
            point=card.point,
            times=chance.randint(1, _most_times(card.point, each)),
        )

    fsync = chance.choice(FSYNC)
    rounds = tuple(drawn(card) for card in itertools.islice(cards, number))
    return Plan(seed, events, curve=seed % 2 == 1, fsync=fsync, rounds=rounds)


_T = TypeVar("_T")


def _dealt(chance: random.Random, deck: Sequence[_T]) -> Iterator[_T]:
    """Shuffled decks, one after the other."""
    while True:
        yield from chance.sample(deck, len(deck))


def _most_times(point: str, events: int) -> int:
    """How often a process surely comes by this point while so many events are on their way."""
    if point.endswith(("-append", "-send")):
        return max(events // 4, 1)
    return 1 if point.endswith(("-hello", "-welcome")) or not point else 3  # once a connection, or once a batch


@dataclass
class Done:
    """What was done to the processes."""

    kills: Counter[str] = field(default_factory=Counter)  # "box", "collector", "both": kill -9 from outside
    stops: Counter[str] = field(default_factory=Counter)  # "box", "collector": SIGTERM
    points: Counter[str] = field(default_factory=Counter)  # by themselves, at fail points
    faults: Counter[Kind] = field(default_factory=Counter)  # of the proxy, those that met something

    @property
    def box_deaths(self) -> int:
        """How often the box died in the middle of something."""
        return self.kills["box"] + self.kills["both"] + sum(n for at, n in self.points.items() if owner(at) == "box")


@dataclass
class Count:
    """What the store holds, held against what the box produced. Lists of k, or of words.

    produced: appended, by what the box wrote down. in_doubt: begun when the box died, so that both are right.
    """

    produced: int = 0
    in_doubt: int = 0
    stored: int = 0
    lost: list[int] = field(default_factory=list)
    duplicate: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # other content, another number, never produced, holes

    @property
    def good(self) -> bool:
        """Whether the promise held."""
        return not (self.lost or self.duplicate or self.wrong)


def count(record: Iterable[tuple[int, tuple[int, int] | None]], stored: Iterable[Event]) -> Count:
    """record: as read_record has it."""
    begun: set[int] = set()
    done: dict[int, tuple[int, int]] = {}
    for k, name in record:
        begun.add(k)
        if name is not None:
            done[k] = name
    found = Count(produced=len(done), in_doubt=len(begun) - len(done))
    seen: set[int] = set()
    numbers: dict[int, set[int]] = {}
    for event in stored:
        header = event.header
        k, name = header.frame, (header.epoch, header.seq)
        found.stored += 1
        numbers.setdefault(header.epoch, set()).add(header.seq)
        if k in seen:
            found.duplicate.append(k)
        seen.add(k)
        if k not in begun:
            found.wrong.append(f"event {k} was never begun")
        elif encode(event) != encode(event_of(k, Stamp(*name, header.notices))):
            found.wrong.append(f"event {k} has other content")
        elif done.get(k, name) != name:
            found.wrong.append(f"event {k} was appended as {done[k]} and is stored as {name}")
    found.lost = sorted(done.keys() - seen)
    for epoch, there in numbers.items():
        if holes := sorted(set(range(max(there))) - there):
            found.wrong.append(f"epoch {epoch} has {len(holes)} holes, the first at {holes[0]}")
    return found


class Process:
    """One of the two programs, through all its lives; a context manager. It writes to `<name>.log` in `folder`."""

    def __init__(self, name: Victim, command: Sequence[str | Path], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command, self._folder = command, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, point: str = "", times: int = 1) -> None:
        """Start it, to die at the point if one is given."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "LOOKOUT_FAILPOINT": f"{point}:{times}" if point else ""}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self._folder, env=env
            )

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return self._running.poll()

    def tell(self, line: str) -> None:
        """Write to its stdin. Where it has just died, nobody hears it."""
        assert self._running.stdin is not None
        with suppress(BrokenPipeError):
            self._running.stdin.write(line.encode() + b"\n")

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        self._running.send_signal(number)

    def reap(self) -> int:
        """Its exit code. Raises ChaosError where it does not end."""
        assert self._running.stdin is not None
        try:
            code = self._running.wait(STOP)
        except subprocess.TimeoutExpired as error:
            raise ChaosError(f"the {self.name} did not end within {STOP:.0f} s") from error
        self._running.stdin.close()
        return code

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self.reap()


@dataclass(frozen=True)
class Outcome:
    """What a run came to; as text, the one line to print."""

    plan: Plan
    done: Done
    count: Count
    gaps: str  # what `collector gaps --json` printed: nothing, where there is none
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return self.count.good and not self.gaps

    def __str__(self) -> str:
        found, done = self.count, self.done
        lost, duplicate = len(found.lost), len(found.duplicate)
        wire = "CURVE" if self.plan.curve else "no encryption"
        return (
            f"chaos: {found.produced} produced, {found.in_doubt} in doubt as the box died, {found.stored} stored:"
            f" {lost} lost, {duplicate} duplicate, {len(found.wrong)} wrong, {'gaps' if self.gaps else 'no gaps'}"
            f" | kill -9: {_counted(done.kills)} | SIGTERM: {_counted(done.stops)}"
            f" | fail points: {_counted(done.points)}"
            f" | proxy: {_counted(done.faults)} | seed {self.plan.seed}, {wire}, fsync {self.plan.fsync}"
            f" | {self.seconds:.1f} s, {found.stored / self.seconds:.0f} events/s"
        )

    def details(self) -> str:
        """The first of all that is wrong, for people."""
        found = self.count
        lines = [f"lost: {found.lost[:20]}"] if found.lost else []
        lines += [f"duplicate: {found.duplicate[:20]}"] if found.duplicate else []
        return "\n".join([*lines, *found.wrong[:20], self.gaps[:2000]])


def _counted(what: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(what.items()) if number) or "none"


Command = Callable[[str, Path, Path | None], Sequence[str | Path]]


def collector_command(address: str, store: Path, keys: Path | None) -> Sequence[str | Path]:
    """The arguments that start a collector. keys: its keyring, where the wire is to be encrypted."""
    words: list[str | Path] = ["run", "--bind", address, "--store", store, "--quiet"]
    if keys:
        words += ["--keys", keys]
    return [*_COLLECTOR, *words]


class Run:
    """Does what `plan` says, in `folder`, and counts. Raises ChaosError where it cannot, also after `limit` seconds.

    collector: the command of the collector that is put to the test.
    """

    def __init__(
        self, plan: Plan, folder: Path, say: Say, limit: float, collector: Command = collector_command
    ) -> None:
        self._plan, self._folder, self._say = plan, folder, say
        self._begun = time.monotonic()
        self._limit = self._begun + limit
        self._said = self._begun
        self._granted, self._rate = 0, 0.0
        self._ended = False
        self._at = "at the start"
        self._command = collector
        self.done = Done()

    def __call__(self) -> Outcome:
        try:
            return self._run()
        except ChaosError as failure:
            logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-TAIL:]}" for log in self._folder.glob("*.log")]
            raise ChaosError("\n".join([f"seed {self._plan.seed}, {self._at}: {failure}", *logs])) from failure

    def _run(self) -> Outcome:
        store = self._folder / "store.db"
        record = self._folder / "record.txt"
        with ExitStack() as stack:
            held = stack.enter_context(held_port())
            port = held.getsockname()[1]
            proxy = stack.enter_context(Proxy(port, self._plan.seed))
            keys, secure = self._keys()
            listen = f"tcp://127.0.0.1:{port}"
            self._collector = stack.enter_context(
                Process("collector", self._command(listen, store, keys), self._folder)
            )
            send: list[str | Path] = ["--address", f"tcp://127.0.0.1:{proxy.port}"]
            send += ["--spool", self._folder / "spool.db", "--fsync", self._plan.fsync, "--record", record, *secure]
            self._box = stack.enter_context(Process("box", [*_PRODUCER, *send], self._folder))
            for process in (self._collector, self._box):
                process.start()
            for number, each in enumerate(self._plan.rounds, 1):
                self._at = f"round {number} of {len(self._plan.rounds)} ({each})"
                self._tell_progress()
                self._round(each, proxy)
            self._at = "at the end"
            proxy.calm()
            self.done.faults.update(proxy.hits)
            self._finish()
        seconds = time.monotonic() - self._begun
        with Store(store) as kept:
            counted = count(read_record(record), kept.events())
        if counted.in_doubt > self.done.box_deaths:
            counted.wrong.append(f"{counted.in_doubt} in doubt, but the box died only {self.done.box_deaths} times")
        return Outcome(self._plan, self.done, counted, self._gaps(store), seconds)

    def _keys(self) -> tuple[Path | None, list[str | Path]]:
        """The collector's keyring, and the box's arguments."""
        if not self._plan.curve:
            return None, []
        ring, key = self._folder / "keys", self._folder / "box.key"
        public = new_keyring(ring)
        allow(ring, DEVICE, new_key(key))
        return ring, ["--key", key, "--collector-key", public]

    def _round(self, each: Round, proxy: Proxy) -> None:
        self._grant(each.events if not each.point else each.events // 2, each.rate)
        for fault in each.faults:
            proxy.begin(fault)
        self._sleep(each.after)
        self._kill(each)
        for victim in each.victims:
            if victim != (each.point and owner(each.point)):
                self._start(victim)
        if each.point:
            self._die_at(each)

    def _kill(self, each: Round) -> None:
        for victim in each.victims:
            self._of(victim).signal(signal.SIGTERM if each.gently else signal.SIGKILL)
        for victim in each.victims:
            code = self._of(victim).reap()
            # where SIGTERM comes before Python has its handler, it ends there and then
            if code not in ((0, -signal.SIGTERM) if each.gently else (-signal.SIGKILL,)):
                raise ChaosError(f"the {victim} ended with exit code {code}")
        if each.gently:
            self.done.stops.update(each.victims)
        elif each.victims:
            self.done.kills["both" if len(each.victims) == 2 else each.victims[0]] += 1

    def _die_at(self, each: Round) -> None:
        """Start the owner of the point and wait for its death there."""
        victim = owner(each.point)
        self._start(victim, each.point, each.times)
        self._grant(each.events - each.events // 2, each.rate)
        nudge = time.monotonic() + NUDGE
        end = time.monotonic() + DIE
        while self._of(victim).code is None:
            self._pause(but=victim)
            if time.monotonic() > end:
                raise ChaosError(f"{each.point}:{each.times} was not reached within {DIE:.0f} s")
            if time.monotonic() > nudge:
                self._grant(NUDGES, each.rate)
                nudge = time.monotonic() + NUDGE
        if (code := self._of(victim).reap()) != -signal.SIGKILL:
            raise ChaosError(f"the {victim} ended with exit code {code}")
        self.done.points[each.point] += 1
        self._start(victim)

    def _finish(self) -> None:
        """Let the box produce the rest and see it delivered, then stop both in good order."""
        self._ended = True
        self._grant(self._plan.events, 0.0)
        while self._box.code is None:
            self._pause(but="box")
        self._collector.signal(signal.SIGTERM)
        for process in (self._box, self._collector):
            if code := process.reap():
                raise ChaosError(f"the {process.name} ended with exit code {code}")

    def _of(self, victim: Victim) -> Process:
        return self._box if victim == "box" else self._collector

    def _start(self, victim: Victim, point: str = "", times: int = 1) -> None:
        self._of(victim).start(point, times)
        if victim == "box":
            self._order()

    def _grant(self, events: int, rate: float) -> None:
        """Have so many more produced, but no more than the plan has."""
        self._granted, self._rate = min(self._granted + events, self._plan.events), rate
        self._order()

    def _order(self) -> None:
        self._box.tell(f"{self._granted} {self._rate}")
        if self._ended:
            self._box.tell(END)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._pause()

    def _pause(self, but: Victim | None = None) -> None:
        """One poll interval. Raises ChaosError when time is up or one of the processes, `but` for one, has died."""
        time.sleep(POLL)
        if time.monotonic() > self._limit:
            raise ChaosError(f"not done after {self._limit - self._begun:.0f} s")
        for process in (self._box, self._collector):
            if process.name != but and process.code is not None:
                raise ChaosError(f"the {process.name} ended with exit code {process.code}")
        if time.monotonic() > self._said + SAY:
            self._tell_progress()

    def _tell_progress(self) -> None:
        self._said = now = time.monotonic()
        self._say(f"{now - self._begun:6.1f} s  {self._granted:6d} events asked for  {self._at}")

    def _gaps(self, store: Path) -> str:
        asked = subprocess.run(
            [*_COLLECTOR, "gaps", "--json", store], capture_output=True, text=True, timeout=STOP, check=False
        )
        if asked.returncode:
            raise ChaosError(f"collector gaps: exit code {asked.returncode}: {asked.stderr}")
        return asked.stdout
