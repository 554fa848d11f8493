"""A whole collector for lookout/1 (docs/protocol.md), to be read and translated into another language.

    python docs/collector_example.py tcp://127.0.0.1:5577 events.sqlite

It needs ZeroMQ and SQLite, and nothing of Lookout. Kill it whenever you like: what it acknowledged is on the disk. It
lets anyone in, so keep it on this machine; docs/protocol.md says what CURVE asks of the socket on a network.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from typing import Any

import zmq

WINDOW = {"events": 256, "bytes": 4 << 20}  # what each box may have on its way
BATCH = 256  # messages per commit
MAX_SESSIONS = 10_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS streams (device, epoch, next, PRIMARY KEY (device, epoch));
CREATE TABLE IF NOT EXISTS events (device, epoch, seq, header, rest, PRIMARY KEY (device, epoch, seq));
CREATE TABLE IF NOT EXISTS gone (device, epoch, first, last, reason);
CREATE TABLE IF NOT EXISTS refused (device, epoch, seq, reason, frames);
"""
FAULTS = (ValueError, TypeError, LookupError, struct.error, RecursionError)  # what reading hostile bytes can raise


class Collector:
    def __init__(self, address: str, path: str) -> None:
        self.db = sqlite3.connect(path)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")  # a commit that has returned survives a power cut
        self.db.executescript(SCHEMA)
        self.socket = zmq.Context().socket(zmq.ROUTER)
        self.socket.maxmsgsize = 16 << 20  # bytes of a frame
        self.socket.heartbeat_ivl = 5000  # ms; with the next line it finds dead connections
        self.socket.heartbeat_timeout = 15000
        self.socket.bind(address)
        self.sessions: dict[bytes, tuple[str, int]] = {}  # connection -> device and epoch of its last HELLO
        self.answers: list[list[bytes]] = []  # wait for the commit

    def run(self) -> None:
        print("listening on", self.socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
        while True:
            due: set[bytes] = set()  # connections to send an ACK to
            self.socket.poll()
            with self.db:  # one transaction: all of the batch or, when this raises, nothing
                for _ in range(BATCH):
                    if not self.socket.poll(0):
                        break
                    peer, *frames = self.socket.recv_multipart()
                    try:
                        if self.hear(peer, frames):
                            due.add(peer)
                    except FAULTS as error:
                        self.reset(peer, f"not understood: {error}"[:500])
            # Only now, after the commit: what a WELCOME or an ACK covers, the box deletes.
            for peer in due & self.sessions.keys():
                device, epoch = self.sessions[peer]
                self.say(peer, "ACK", epoch=epoch, next=self.next(device, epoch), window=WINDOW)
            for answer in self.answers:
                self.socket.send_multipart(answer)
            self.answers.clear()

    def hear(self, peer: bytes, frames: list[bytes]) -> bool:
        """Take one message. True: an ACK is due."""
        if frames[0] == b"HELLO":
            self.hello(peer, json.loads(frames[1]))
        elif peer not in self.sessions:
            self.reset(peer, "HELLO comes first")
        elif frames[0] == b"PING":
            self.answers.append([peer, b"PONG"])
        elif frames[0] == b"DATA":
            seq = number(*struct.unpack(">Q", frames[1]))
            return self.take(peer, seq, seq, None, frames[2:])
        elif frames[0] == b"GONE":
            gone = json.loads(frames[1])
            return self.take(peer, number(gone["first"]), number(gone["last"]), str(gone["reason"]), [])
        else:
            self.reset(peer, "no message of lookout/1")
        return False

    def hello(self, peer: bytes, hello: dict[str, Any]) -> None:
        if hello["protocol"] != "lookout/1":
            self.say(peer, "DENIED", reason="this collector speaks lookout/1")
            return
        device, epoch, first = str(hello["device"]), number(hello["epoch"]), number(hello["first"])
        kept = self.next(device, epoch)
        if first > kept:  # thrown away by the box, before it could say so
            self.gone(device, epoch, kept, first - 1, "not kept by the box")
        if len(self.sessions) >= MAX_SESSIONS:
            del self.sessions[next(iter(self.sessions))]  # the oldest; if it still lives, a RESET tells it
        self.sessions[peer] = device, epoch
        self.say(peer, "WELCOME", protocol="lookout/1", epoch=epoch, next=max(kept, first), window=WINDOW)

    def take(self, peer: bytes, first: int, last: int, reason: str | None, event: list[bytes]) -> bool:
        """What stands for the numbers first..last: an event, or the reason why there is none."""
        device, epoch = self.sessions[peer]
        expected = self.next(device, epoch)
        if first > expected:
            self.reset(peer, f"expected number {expected}, got {first}")
            return False
        if last >= expected:  # else it is here already, and all it lacks is the ACK
            if reason is not None:
                self.gone(device, epoch, max(first, expected), last, reason)
            else:
                self.event(peer, device, epoch, first, event)
        return True

    def event(self, peer: bytes, device: str, epoch: int, seq: int, frames: list[bytes]) -> None:
        try:
            header = json.loads(frames[0])
            if [header["device"], header["epoch"], header["seq"]] != [device, epoch, seq]:
                raise ValueError("its header names another event")
        except FAULTS as error:  # to send it again would not make it better: set aside, and acknowledged all the same
            why = f"no event: {error}"[:500]
            self.db.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?)", (device, epoch, seq, why, packed(frames)))
            self.say(peer, "REFUSED", epoch=epoch, seq=seq, reason=why)
        else:
            row = (device, epoch, seq, frames[0], packed(frames[1:]))
            self.db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
        self.advance(device, epoch, seq + 1)

    def gone(self, device: str, epoch: int, first: int, last: int, reason: str) -> None:
        self.db.execute("INSERT INTO gone VALUES (?, ?, ?, ?, ?)", (device, epoch, first, last, reason))
        self.advance(device, epoch, last + 1)

    def next(self, device: str, epoch: int) -> int:
        """Everything below this number is accounted for."""
        row = self.db.execute("SELECT next FROM streams WHERE device = ? AND epoch = ?", (device, epoch)).fetchone()
        return row[0] if row else 0

    def advance(self, device: str, epoch: int, to: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO streams VALUES (?, ?, ?)", (device, epoch, to))

    def reset(self, peer: bytes, reason: str) -> None:
        """The box will hang up, and come back with a HELLO."""
        self.sessions.pop(peer, None)
        self.say(peer, "RESET", reason=reason)

    def say(self, peer: bytes, name: str, **fields: object) -> None:
        self.answers.append([peer, name.encode(), json.dumps(fields).encode()])


def number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63 - 1:
        raise ValueError(f"{value!r} is no number")
    return value


def packed(frames: list[bytes]) -> bytes:
    """Frames in one string, each behind its length."""
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


if __name__ == "__main__":
    Collector(*sys.argv[1:]).run()
