"""A TCP proxy that does to a connection what networks do: refuse, swallow, delay, reset, fall silent, cut mid-frame."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import Any, Literal, get_args

Kind = Literal["refuse", "blackhole", "delay", "reset", "half-open", "cut"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LASTING = frozenset({"refuse", "blackhole", "delay"})
CHUNK = 64 << 10  # bytes read at once
DELAY = 0.25  # s, the longest that one chunk is held back
ANSWER = 10.0  # s, the longest that the thread may take to do what it is asked
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST


@dataclass(frozen=True)
class Fault:
    """Something to go wrong, `after` seconds from now. One that lasts goes on until it has met something.

    refuse: connections are reset and new ones refused, for `seconds`. blackhole: whatever passes within `seconds` is
    swallowed; a connection that lost bytes so, or was made meanwhile, never carries anything again, and nobody is told.
    delay: each chunk within `seconds` is held back by up to DELAY. The others happen once, where a chunk comes after
    `chunks` more have passed. reset: RST to both ends. half-open: the connection stays, but carries nothing any more,
    not even its end. cut: a part of the chunk gets through, then RST to both ends.
    """

    kind: Kind
    after: float = 0.0
    seconds: float = 0.0
    chunks: int = 0


@dataclass(eq=False)
class _Pending:
    """A fault that has begun. chunks: those still to pass. met: it has done something. over: its time is."""

    fault: Fault
    chunks: int
    met: bool = False
    over: bool = False


@dataclass(eq=False)
class _Connection:
    mute: bool = False


class Proxy:
    """Listens on a free port of 127.0.0.1, in a thread of its own, and connects to port `target`; a context manager.

    seed: of lengths and delays. hits: how many faults of each kind have done something.
    """

    def __init__(self, target: int, seed: int = 0) -> None:
        self.hits: Counter[Kind] = Counter()
        self._target = target
        self._random = random.Random(seed)
        self._lasting: list[_Pending] = []
        self._waiting: list[_Pending] = []  # those that happen once, one after the other
        self._timers: set[asyncio.TimerHandle] = set()
        self._carrying: set[asyncio.Task[None]] = set()  # a connection each
        self._turning: set[asyncio.Task[None]] = set()  # each lets it listen or not, as it should then
        self._closing = False
        self._listener: socket.socket | None = None
        self._changing = asyncio.Lock()
        self._held = held_port()
        self.port: int = self._held.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._ask(self._listen_or_not())

    def begin(self, fault: Fault) -> None:
        """Let it happen."""
        self._ask(self._plan(fault))

    def calm(self) -> None:
        """No more faults, neither those that last nor those to come. What they did is not undone."""
        self._ask(self._calm())

    def close(self) -> None:
        """Reset all connections."""
        if not self._loop.is_closed():
            self._ask(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(ANSWER)
            self._loop.close()
            self._held.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER)

    # All below is done by the thread.

    async def _plan(self, fault: Fault) -> None:
        self._later(fault.after, lambda: self._start(_Pending(fault, fault.chunks)))

    async def _calm(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._waiting.clear()
        self._lasting.clear()
        await self._listen_or_not()

    async def _end(self) -> None:
        self._closing = True
        await self._calm()
        await asyncio.gather(*self._turning)

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        def now() -> None:
            self._timers.discard(timer)
            then()

        timer = self._loop.call_later(seconds, now)
        self._timers.add(timer)

    def _start(self, pending: _Pending) -> None:
        if pending.fault.kind in LASTING:
            self._lasting.append(pending)
            self._later(pending.fault.seconds, lambda: self._stop(pending))
            self._turn()
        else:
            self._waiting.append(pending)

    def _stop(self, pending: _Pending) -> None:
        pending.over = True
        if pending.met:
            self._lasting.remove(pending)
        self._turn()

    def _turn(self) -> None:
        turning = self._loop.create_task(self._listen_or_not())
        self._turning.add(turning)  # or it might be collected before it is done
        turning.add_done_callback(self._turning.discard)

    async def _listen_or_not(self) -> None:
        async with self._changing:
            if self._closing or self._meets("refuse"):
                await self._shut()
            elif self._listener is None:
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", self.port))
                listener.listen()
                listener.setblocking(False)
                self._loop.add_reader(listener, self._accept, listener)
                self._listener = listener

    async def _shut(self) -> None:
        """Stop listening, reset what is connected."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in (carrying := [*self._carrying]):
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        """Take a connection, in one step: an awaited one that is cancelled as it arrives would be nobody's to close."""
        try:
            client, _ = listener.accept()
        except OSError:  # it has gone again
            return
        carrying = self._loop.create_task(self._carry(client))
        self._carrying.add(carrying)

        def ended(task: asyncio.Task[None]) -> None:
            self._carrying.discard(task)
            client.close()  # a task that is cancelled before its first step never gets to its `with`

        carrying.add_done_callback(ended)

    async def _carry(self, client: socket.socket) -> None:
        """One connection from its beginning to its end."""
        here = _Connection(mute=self._meets("blackhole"))
        pumps: list[asyncio.Task[None]] = []
        with client, socket.socket() as server:
            client.setblocking(False)
            server.setblocking(False)
            try:
                if not here.mute:
                    await self._loop.sock_connect(server, ("127.0.0.1", self._target))
                    for end in (client, server):
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    pumps.append(self._loop.create_task(self._pump(here, server, client)))
                pumps.append(self._loop.create_task(self._pump(here, client, server)))
                await asyncio.gather(*pumps)
            except (OSError, asyncio.CancelledError):  # where one end is reset, or nobody is there, so is the other
                for end in (client, server):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, here: _Connection, source: socket.socket, target: socket.socket) -> None:
        """One direction until it ends. Raises ConnectionError where both are to end."""
        try:
            while chunk := await self._loop.sock_recv(source, CHUNK):
                if self._meets("delay"):
                    await asyncio.sleep(self._random.uniform(0, DELAY))
                here.mute = here.mute or self._meets("blackhole")
                if here.mute:
                    continue
                match self._due():
                    case "half-open":
                        here.mute = True
                        continue
                    case "reset":
                        raise ConnectionResetError
                    case "cut":
                        await self._loop.sock_sendall(target, chunk[: self._random.randrange(len(chunk))])
                        raise ConnectionResetError
                await self._loop.sock_sendall(target, chunk)
            if not here.mute:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            if not here.mute:
                raise

    def _meets(self, kind: Kind) -> bool:
        """Whether a fault of this kind is on; then it has met something."""
        for pending in (found := [each for each in self._lasting if each.fault.kind == kind]):
            self.hits[kind] += not pending.met
            pending.met = True
            if pending.over:
                self._lasting.remove(pending)
        return bool(found)

    def _due(self) -> Kind | None:
        """What happens once, to this chunk."""
        if not self._waiting:
            return None
        first = self._waiting[0]
        if first.chunks:
            first.chunks -= 1
            return None
        self._waiting.remove(first)
        self.hits[first.fault.kind] += 1
        return first.fault.kind


def held_port() -> socket.socket:
    """A bound socket that does not listen: others may, on its port, by number and with SO_REUSEADDR.

    Without it, the system could give the port to an outgoing connection while nobody listens on it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
