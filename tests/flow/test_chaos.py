"""Kill the box, the collector and the wire at every step: nothing is lost or doubled, and a run that loses is seen."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge.events import Event, Stamp
from edge.failpoints import POINTS
from tests.chaos.harness import Command, Count, Outcome, Plan, Round, Run, collector_command, count, plan_from_seed
from tests.chaos.producer import CROP_BYTES, DIM, PEOPLE, Record, event_of, read_record
from tests.chaos.proxy import KINDS

SEED, EVENTS = 12, 10_000
LIMIT = 175.0  # s, of all runs together


def chaos(
    plans: Sequence[Plan], folder: Path, capsys: pytest.CaptureFixture[str], collector: Command
) -> Sequence[Outcome]:
    """Run them side by side; seeds and lines are seen whether it passes or not."""
    folders = [folder / str(plan.seed) for plan in plans]
    for each in folders:
        each.mkdir()
    with capsys.disabled(), ThreadPoolExecutor() as pool:
        print(f"\nchaos: seeds {', '.join(str(plan.seed) for plan in plans)}", flush=True)
        running = [
            pool.submit(Run(plan, each, lambda line: None, LIMIT, collector))
            for plan, each in zip(plans, folders, strict=True)
        ]
        outcomes = [run.result() for run in running]
        print("\n".join(map(str, outcomes)), flush=True)
    return outcomes


def test_no_event_is_lost_or_doubled_whatever_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run as ever and one by chance, one of them encrypted; a failed one is to be replayed by its seed."""
    chance = 2 * secrets.randbelow(500_000) + 1
    plans = [plan_from_seed(SEED, EVENTS), plan_from_seed(chance, EVENTS // 2)]
    assert {plan.curve for plan in plans} == {False, True}
    outcomes = chaos(plans, tmp_path, capsys, collector_command)
    for plan, outcome in zip(plans, outcomes, strict=True):
        assert outcome.good, f"seed {plan.seed}: {outcome.details()}"
        assert outcome.count.produced + outcome.count.in_doubt == plan.events
        assert outcome.done.points.keys() == POINTS
        assert outcome.done.kills.keys() == {"box", "collector", "both"}
        assert "0 lost, 0 duplicate" in str(outcome)
    assert {kind for outcome in outcomes for kind in outcome.done.faults} == set(KINDS)


WRONG = """
import signal, sys, time
from pathlib import Path
import zmq
from collector.sinks import Item
from collector.store import Store
from edge.events import decode
from edge.protocol import Ack, Data, Hello, Ping, Pong, Welcome, Window, encode, from_box

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
window = Window(events=64, bytes=1 << 20)
boxes = {}  # peer -> device, epoch
waiting = []
with Store(Path(sys.argv[2]), create=True) as store, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
    router.linger = 0
    router.bind(sys.argv[1])
    while not stopped:
        if not router.poll(20):
            continue
        peer, *frames = router.recv_multipart()
        message = from_box(frames)
        if isinstance(message, Hello):
            boxes[peer] = message.device, message.epoch
            start = max(message.first, store.resume(message.device, message.epoch) or 0)
            router.send_multipart([peer, *encode(Welcome(epoch=message.epoch, next=start, window=window))])
        elif isinstance(message, Ping):
            router.send_multipart([peer, *encode(Pong())])
        elif isinstance(message, Data):
            device, epoch = boxes[peer]
            router.send_multipart([peer, *encode(Ack(epoch=epoch, next=message.seq + 1, window=window))])
            event = decode(message.frames)
            waiting.append(Item(device, epoch, message.seq, message.seq, event, message.frames))
    if waiting:
        store.add(waiting, time.time())
"""


def test_a_collector_that_acknowledges_before_it_stores_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(address: str, store: Path, keys: Path | None) -> Sequence[str | Path]:
        return [sys.executable, "-c", WRONG, address, store]

    rounds = (Round(events=200, rate=100, faults=(), after=3.0, victims=("collector",)),) * 3
    plan = Plan(seed=0, events=700, curve=False, fsync="never", rounds=rounds)
    (outcome,) = chaos([plan], tmp_path, capsys, wrong)
    assert outcome.count.lost
    assert not outcome.good
    assert f"{len(outcome.count.lost)} lost, 0 duplicate" in str(outcome)
    assert outcome.count.stored, "it kept nothing at all: that is another mistake"


def test_a_plan_is_its_seed() -> None:
    assert plan_from_seed(7, 10_000) == plan_from_seed(7, 10_000)
    assert plan_from_seed(7, 10_000) != plan_from_seed(8, 10_000)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("events", [2000, 10_000, 100_000])
def test_a_plan_has_everything_in_it(seed: int, events: int) -> None:
    plan = plan_from_seed(seed, events)
    assert {each.point for each in plan.rounds} == {"", *POINTS}
    assert {fault.kind for each in plan.rounds for fault in each.faults} == set(KINDS)
    assert {each.victims for each in plan.rounds} >= {("box",), ("collector",), ("box", "collector")}
    assert sum(each.events for each in plan.rounds) <= 0.8 * events
    assert plan.curve == bool(seed % 2)


def test_an_event_is_its_k() -> None:
    events = [event_of(k, Stamp(1, k)) for k in range(200)]
    again = [event_of(k, Stamp(1, k)) for k in range(200)]
    assert [event.header for event in events] == [event.header for event in again]
    assert all((a.embeddings == b.embeddings).all() and a.crops == b.crops for a, b in zip(events, again, strict=True))
    assert {len(event.header.people) for event in events} == set(range(PEOPLE + 1))
    crops = [crop for event in events for crop in event.crops if crop]
    assert len(crops) > 20
    assert max(map(len, crops)) > CROP_BYTES[1] / 2
    assert all(event.embeddings.shape[1] == DIM for event in events)


def test_a_record_goes_on_where_it_was(tmp_path: Path) -> None:
    def appended(build: Callable[[Stamp], Event]) -> None:
        build(Stamp(7, 3))

    def killed(build: Callable[[Stamp], Event]) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "record"
    record = Record(path)
    record.append(0, appended)
    with pytest.raises(KeyboardInterrupt):
        record.append(1, killed)
    assert list(read_record(path)) == [(0, None), (0, (7, 3)), (1, None)]
    assert Record(path).next == 2, "what is in doubt is not produced again"


def record_of(*done: int, begun: Sequence[int] = ()) -> Iterator[tuple[int, tuple[int, int] | None]]:
    for k in done:
        yield k, None
        yield k, (1, k)
    yield from ((k, None) for k in begun)


def stored(*names: tuple[int, int, int]) -> Iterator[Event]:
    """Of k, epoch, seq."""
    return (event_of(k, Stamp(epoch, seq)) for k, epoch, seq in names)


ALL = [(0, 1, 0), (1, 1, 1), (2, 1, 2)]


@pytest.mark.parametrize(
    ("begun", "events", "found"),
    [
        ((), ALL, {}),
        ((3,), ALL, {"in_doubt": 1}),
        ((3,), [*ALL, (3, 1, 3)], {"in_doubt": 1, "stored": 4}),
        ((), ALL[:2], {"lost": [2], "stored": 2}),
        ((), [], {"lost": [0, 1, 2], "stored": 0}),
        ((), [*ALL, (1, 1, 3)], {"duplicate": [1], "stored": 4, "wrong": ["event 1 was appended as"]}),
        ((), [*ALL[:2], (2, 2, 0)], {"wrong": ["event 2 was appended as (1, 2) and is stored as (2, 0)"]}),
        ((), [*ALL, (3, 1, 3)], {"stored": 4, "wrong": ["event 3 was never begun"]}),
        ((3,), [*ALL, (3, 1, 5)], {"in_doubt": 1, "stored": 4, "wrong": ["epoch 1 has 2 holes, the first at 3"]}),
        ((), [*ALL[:1], *ALL[2:]], {"lost": [1], "stored": 2, "wrong": ["epoch 1 has 1 holes, the first at 1"]}),
    ],
)
def test_the_count(begun: Sequence[int], events: Sequence[tuple[int, int, int]], found: dict[str, object]) -> None:
    counted = count(record_of(0, 1, 2, begun=begun), stored(*events))
    expected = {"produced": 3, "in_doubt": 0, "stored": 3, "lost": [], "duplicate": [], "wrong": [], **found}
    wrong = expected.pop("wrong")
    assert isinstance(wrong, list)
    assert {name: getattr(counted, name) for name in expected} == expected
    assert len(counted.wrong) == len(wrong)
    assert all(said.startswith(start) for said, start in zip(counted.wrong, wrong, strict=True))
    assert counted.good == (not (counted.lost or counted.duplicate or counted.wrong))


def other_person(event: Event) -> Event:
    header = event.header.model_copy(update={"skipped": event.header.skipped + 1})
    return Event(header, event.embeddings, event.crops)


def other_vector(event: Event) -> Event:
    return Event(event.header, -event.embeddings, event.crops)


def other_crop(event: Event) -> Event:
    return Event(event.header, event.embeddings, tuple(crop and crop + b"\0" for crop in event.crops))


@pytest.mark.parametrize("change", [other_person, other_vector, other_crop])
def test_the_count_looks_at_content(change: object) -> None:
    k = next(k for k in range(100) if any(event_of(k, Stamp(1, 0)).crops))
    record = [(k, None), (k, (1, 0))]
    assert count(record, [event_of(k, Stamp(1, 0))]).good
    assert callable(change)
    assert count(record, [change(event_of(k, Stamp(1, 0)))]).wrong == [f"event {k} has other content"]
    noticed = event_of(k, Stamp(1, 0, ("the disk was full",)))
    assert count(record, [noticed]) == Count(produced=1, stored=1), "notices are the spool's own"
