"""What came since the collector started, counted, for people to look at."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from collector.sinks import Item, Kept, Outcome
from edge.events import Event, Header, Person
from edge.protocol import Gone

RATE_SECONDS = 10.0  # events per second are averaged over this
MAX_DEVICES = 10_000  # of which it is known when they last sent something
MAX_CAMERAS = 1000  # of which the view knows something; names come from the wire and could be endless

# control characters, line and paragraph separators, and what reverses the direction of writing
_HARMFUL = dict.fromkeys([*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], "?")


@dataclass
class Camera:
    """What came from one camera since the server started. Times are `time.monotonic`, seconds."""

    first_seen: float
    last_seen: float = 0.0
    events: int = 0
    people: int = 0
    last: Header | None = None  # of the newest event
    newest: tuple[Person, ...] = ()  # of the newest event with anybody in it
    _arrivals: deque[float] = field(default_factory=deque)  # within the last RATE_SECONDS

    def note(self, header: Header, now: float) -> None:
        """Count one new event."""
        self.events += 1
        self.people += len(header.people)
        self.last, self.last_seen = header, now
        self.newest = header.people or self.newest
        self._arrivals.append(now)
        self.rate(now)  # forgets the old ones

    def rate(self, now: float) -> float:
        """Events per second, lately."""
        while self._arrivals and self._arrivals[0] < now - RATE_SECONDS:
            self._arrivals.popleft()
        return len(self._arrivals) / min(max(now - self.first_seen, 1.0), RATE_SECONDS)


@dataclass
class Stats:
    """What the server did since it started. Read it between two steps of `Server.run`.

    boxes: devices that are connected now. refused: messages that are none or may not be, and events set aside. gone:
    events that boxes had to drop, as they told. resets: how often a box was asked to begin again. handshakes_refused:
    connections that encryption, or another protocol, did not let in; those that just hung up among them. cameras: by
    (device, camera), the one heard longest ago first; at most MAX_CAMERAS, those heard last. devices: the time of the
    latest new event of each, `time.monotonic`; at most MAX_DEVICES, likewise.
    """

    events: int = 0
    people: int = 0
    duplicates: int = 0
    refused: int = 0
    gone: int = 0
    resets: int = 0
    handshakes_refused: int = 0
    boxes: int = 0
    cameras: dict[tuple[str, str], Camera] = field(default_factory=dict)
    devices: dict[str, float] = field(default_factory=dict)

    def count(self, item: Item, outcome: Outcome, now: float) -> None:
        """Count what became of an item."""
        match outcome.kept, item.payload:
            case Kept.DUPLICATE, _:
                self.duplicates += 1
            case Kept.REFUSED, _:
                self.refused += 1
            case Kept.NEW, Gone() as gone:
                self.gone += gone.count
            case Kept.NEW, Event(header=header):
                self._note(header, now)

    def _note(self, header: Header, now: float) -> None:
        self.events += 1
        self.people += len(header.people)
        name = (header.device, header.camera)
        camera = self.cameras.pop(name, None) or Camera(now)
        camera.note(header, now)
        self.cameras[name] = camera  # as the last: a dict keeps its order
        if len(self.cameras) > MAX_CAMERAS:
            del self.cameras[next(iter(self.cameras))]
        self.devices.pop(header.device, None)
        self.devices[header.device] = now
        if len(self.devices) > MAX_DEVICES:
            del self.devices[next(iter(self.devices))]


def harmless(text: str) -> str:
    """`text` from the wire without what moves a terminal's cursor or a spreadsheet's: one "?" for each."""
    return text.translate(_HARMFUL)
