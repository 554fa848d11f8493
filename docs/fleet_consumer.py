"""Feeds a store from the fleet's stream (docs/fleet.md): one place to search what a thousand boxes saw.

    python docs/fleet_consumer.py nats://127.0.0.1:4222 fleet.db

Kill it whenever you like: JetStream sends again what was not acknowledged, and a store ignores what it has.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from time import time

import nats
import nats.errors
from nats.aio.msg import Msg

from collector.messages import STREAM, device, unpack
from collector.sinks import Item, Poison
from collector.store import Store
from edge.errors import WireError
from edge.events import decode
from edge.protocol import Gone

BATCH = 256  # messages per commit


async def main(url: str, path: str) -> None:
    client = await nats.connect(url, max_reconnect_attempts=-1)
    reader = await client.jetstream().pull_subscribe("lookout.>", durable="store", stream=STREAM)
    with Store(Path(path), create=True) as store:
        print("reading", STREAM, flush=True)
        while True:
            try:
                messages = await reader.fetch(BATCH, timeout=5)
            except nats.errors.TimeoutError:  # nothing new
                continue
            store.add([item_of(message) for message in messages], received_at=time())
            for message in messages:  # only now, after the commit
                await message.ack()


def item_of(message: Msg) -> Item:
    """What a message of the stream tells of one box."""
    kind, headers = message.subject.split(".")[1], message.headers or {}
    first, _, last = headers["Lookout-Seq"].partition("-")
    where = (device(headers["Lookout-Device"]), int(headers["Lookout-Epoch"]), int(first), int(last or first))
    if kind == "gone":
        return Item(*where, Gone.model_validate_json(message.data))
    frames = tuple(unpack(message.data))
    if kind == "refused":
        return Item(*where, Poison(headers["Lookout-Reason"]), frames)
    try:
        return Item(*where, decode(frames), frames)
    except WireError as error:  # written by a newer version, or by another program
        return Item(*where, Poison(str(error)), frames)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
