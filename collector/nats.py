"""Into NATS JetStream: a collector with this sink keeps nothing itself, so several may stand before one stream."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import threading
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from collector.messages import STREAM, SUBJECTS, Message, message_of
from collector.sinks import Item, Kept, Outcome
from edge.errors import ConfigError, LookoutError, StoreError

try:
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.api import StorageType, StreamConfig
except ModuleNotFoundError as missing:
    raise ConfigError(
        "a sink in NATS needs the package nats-py", got="none", remedy="python -m pip install 'lookout[nats]'"
    ) from missing

ALL = "lookout.>"  # what a new stream captures
WINDOW = 600.0  # s for which a new stream knows the message ids it has seen
PATIENCE = 10.0  # s without progress after which a connection counts as lost
GRACE = 2.0  # s that NATS has left once `cancel` was called
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # s between tries, doubled each time
LOG_SECONDS = 60.0  # between two lines about the same trouble

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


# --- where it stands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Servers of one NATS, without what must not be printed; `str` is how it is named to people."""

    servers: tuple[str, ...]  # scheme://host:port
    login: dict[str, str] = field(repr=False)  # user and password, or token, as Client.connect takes them

    @property
    def encrypted(self) -> bool:
        """Whether a server without TLS is to be refused."""
        return self.servers[0].startswith("tls:")

    def __str__(self) -> str:
        return ",".join(self.servers)


def address_of(url: str) -> Address:
    """Servers of one cluster with commas between, nats:// or tls://; who one is stands before the first host.

    Raises ConfigError, which does not repeat what may be a password.
    """
    servers, login = [], dict[str, str]()
    for one in url.split(","):
        try:
            parts = urlsplit(one)
            host, port = parts.hostname or "", parts.port or 4222
        except ValueError:  # it may quote what is secret
            raise _no_address("a host or port that cannot be") from None
        if not one.startswith(("nats://", "tls://")):
            raise _no_address("no such scheme")
        if not re.fullmatch(r"[\w.:%-]+", host):
            raise _no_address("no host" if not host else "a host that cannot be")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise _no_address("something behind the port")
        servers.append(f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        if parts.username and not login:
            name = unquote(parts.username)
            login = {"token": name} if parts.password is None else {"user": name, "password": unquote(parts.password)}
    if len({server.partition(":")[0] for server in servers}) > 1:
        raise _no_address("nats:// and tls:// together")
    return Address(tuple(servers), login)


def _no_address(got: str) -> ConfigError:
    wanted = "nats://HOST:PORT or tls://HOST:PORT, or several of a cluster with commas between"
    return ConfigError("not an address of NATS", expected=wanted, got=got)


# --- one connection ---------------------------------------------------------------------------------------------------


class _Client(Client):
    """nats-py with two things put right.

    Asked for TLS, it would speak in the clear where the server offers none. And it would not hang up before the other
    end has read everything, which a dead one never does.
    """

    def __init__(self, encrypted: bool) -> None:
        super().__init__()
        self._encrypted = encrypted

    def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> Coroutine[Any, Any, None]:
        if self._encrypted and not info.get("tls_required"):  # before it sends who we are
            raise nats.errors.SecureConnWantedError
        return super()._process_info(info, initial_connection)

    async def hang_up(self) -> None:
        """At once: what is not acknowledged is sent again over another connection."""
        self._pending_data_size = 0  # what would be flushed
        if writer := getattr(self._transport, "_io_writer", None):
            writer.transport.abort()
        with suppress(Exception):  # nobody waits for anything from it any more
            await asyncio.wait_for(self.close(), 1.0)


class _Connection:
    """One connection, until its first trouble; then another one is made. Its methods raise StoreError or ConfigError.

    limit: bytes of headers and payload that server and stream take. All of it runs in one loop's thread.
    """

    def __init__(self, address: Address, patience: float) -> None:
        self.limit, self.limited_by = 0, ""
        self._address, self._patience = address, patience
        self._client = _Client(address.encrypted)
        self._trouble: Exception | None = None  # the last that nats-py told of
        self._inbox = self._client.new_inbox()
        self._awaited: dict[str, int] = {}  # subject of an acknowledgement -> place in the batch
        self._known: list[bool] = []  # by place: whether JetStream had it already
        self._sent = 0
        self._settled = asyncio.Event()  # all are acknowledged, or it has failed

    async def open(self) -> None:
        """Connect, and make sure of the stream."""
        try:
            await asyncio.wait_for(
                self._client.connect(
                    servers=list(self._address.servers),
                    **self._address.login,  # type: ignore[arg-type]  # strings all
                    name="lookout collector",
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    allow_reconnect=False,  # it would not tell what became of a batch
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=5,
                    ping_interval=20,
                ),
                self._patience,
            )
            await self._ensure_stream()
            await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        except (OSError, nats.errors.Error, asyncio.TimeoutError) as error:
            raise self._failed(error) from error

    async def _ensure_stream(self) -> None:
        jetstream = self._client.jetstream()
        try:
            config = (await jetstream.stream_info(STREAM)).config
        except nats.js.errors.ServiceUnavailableError as error:
            what = f"NATS at {self._address}: JetStream is not switched on"
            raise StoreError(what, remedy="start nats-server with --jetstream") from error
        except nats.js.errors.NotFoundError:
            made = StreamConfig(
                name=STREAM, subjects=[ALL], storage=StorageType.FILE, duplicate_window=WINDOW
            )  # how long and how much it keeps is for its owner to say
            config = (await jetstream.add_stream(made)).config
            log.warning("NATS at %s: made the stream %s, which has no bounds yet", self._address, STREAM)
        for subject in SUBJECTS:
            if not any(_captures(pattern, subject) for pattern in config.subjects or ()):
                raise ConfigError(
                    f"NATS at {self._address}: stream {STREAM} does not capture {subject}",
                    got=", ".join(config.subjects or ()) or "no subject",
                    remedy=f"let it capture {ALL}",
                )
        if config.no_ack:
            raise ConfigError(f"NATS at {self._address}: stream {STREAM} acknowledges nothing (no_ack)")
        self.limit, self.limited_by = self._client.max_payload, "max_payload in the server's configuration"
        if config.max_msg_size is not None and 0 <= config.max_msg_size < self.limit:
            self.limit, self.limited_by = config.max_msg_size, f"max_msg_size of the stream {STREAM}"

    async def publish(self, messages: Sequence[Message]) -> list[bool]:
        """Send all of them and wait until all are kept. Of each: whether JetStream had it already."""
        self._known = [False] * len(messages)
        self._awaited = {f"{self._inbox}.{place}": place for place in range(len(messages))}
        self._settled.clear()
        sending = asyncio.create_task(self._send(messages))
        try:
            while self._awaited:
                before = (self._sent, len(self._awaited))
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._settled.wait(), self._patience)
                if self._settled.is_set() and self._awaited:
                    raise self._failed(self._trouble)
                if before == (self._sent, len(self._awaited)):
                    raise self._failed(asyncio.TimeoutError())
        finally:
            sending.cancel()
        return self._known

    async def _send(self, messages: Sequence[Message]) -> None:
        try:
            for place, message in enumerate(messages):
                reply = f"{self._inbox}.{place}"
                await self._client.publish(message.subject, message.payload, reply, headers=message.headers)
                self._sent += 1
        except (OSError, nats.errors.Error) as error:
            self._fail(error)

    async def _on_answer(self, answer: Msg) -> None:
        if (answer.headers or {}).get("Status") == "503":
            self._fail(nats.js.errors.NoStreamResponseError())
            return
        try:
            said = json.loads(answer.data)
            if error := said.get("error"):
                self._fail(nats.js.errors.APIError(**error))
            elif said.get("stream") == STREAM:  # and not somebody else who answers what is published here
                self._known[self._awaited.pop(answer.subject)] = bool(said.get("duplicate"))
                if not self._awaited:
                    self._settled.set()
        except (ValueError, AttributeError, TypeError, KeyError):
            log.warning("NATS at %s: an answer that is no acknowledgement", self._address)

    async def _on_error(self, error: Exception) -> None:
        self._trouble = error

    async def _on_closed(self) -> None:
        self._settled.set()

    def _fail(self, error: Exception) -> None:
        self._trouble = error
        self._settled.set()

    def _failed(self, error: Exception | None) -> StoreError:
        """`error` in words; what nats-py told before it gave up says more than that it did."""
        match error := self._trouble or error:
            case None | nats.errors.StaleConnectionError():
                words = "the connection broke"
            case asyncio.TimeoutError():
                words = "it does not answer"
            case nats.js.errors.APIError():
                words = error.description or str(error)
            case OSError():
                words = error.strerror or str(error)
            case _:
                words = str(error).removeprefix("nats: ")
        return StoreError(f"NATS at {self._address}: {words}")

    async def close(self) -> None:
        """Let go of it, whatever state it is in."""
        await self._client.hang_up()


def _captures(pattern: str, subject: str) -> bool:
    """Whether a stream with subject `pattern` gets all that is published to `subject`, which may hold `*`."""
    wanted = subject.split(".")
    for place, word in enumerate(pattern.split(".")):
        if word == ">":
            return place < len(wanted)
        if place >= len(wanted) or word not in ("*", wanted[place]):
            return False
    return len(pattern.split(".")) == len(wanted)


# --- the sink ---------------------------------------------------------------------------------------------------------


class NatsSink:
    """A Sink into the JetStream at `url` (see `address_of`); a context manager.

    It makes the stream LOOKOUT where there is none, on file, with a duplicate window of ten minutes; one that is there
    stays as its owner made it. Every message has an id made of device, epoch and number, so that what several
    collectors send, or one sends again, is there once.

    While NATS is away `add` does not return: it tries until NATS is back. Nothing is acknowledged meanwhile, so
    the boxes keep their events and their windows fill. `cancel` ends that. Raises ConfigError for a url or a stream
    that cannot be used, StoreError for a NATS that is not there or refuses: at the start, this is an end.

    To be used by one thread, but for `cancel`; NATS itself is spoken to in a thread of the sink's own.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.address = address_of(url)
        self._patience = patience
        self._connection: _Connection | None = None
        self._away_since: float | None = None  # monotonic
        self._log_again = 0.0  # monotonic
        self._give_up_at = math.inf  # monotonic
        self._cancelled = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        try:
            self._wait_for(self._connected())
        except BaseException:
            self.close()
            raise

    def resume(self, device: str, epoch: int) -> int | None:
        """None: a stream is not asked what it holds; what a box sends again is known by its id."""
        return None

    def add(self, items: Sequence[Item], received_at: float) -> list[Outcome]:
        """Publish `items` in this order; return once JetStream has acknowledged every one of them.

        DUPLICATE: its id was in the stream within the duplicate window. REFUSED: it is no event, or larger than NATS
        takes, and its leading frames are kept under lookout.refused. Raises StoreError only after `cancel` or `close`;
        some may be in the stream then, and sending them again does no harm. received_at: the stream has its own clock.
        """
        return self._wait_for(self._keep(items))

    def cancel(self) -> None:
        """Wait for an absent NATS no longer than GRACE from now. From any thread, and from a signal handler."""
        self._give_up_at = min(self._give_up_at, monotonic() + GRACE)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._cancelled.set)

    async def _keep(self, items: Sequence[Item]) -> list[Outcome]:
        pause = FIRST_PAUSE
        while True:
            try:
                outcomes = await self._unless_cancelled(self._publish(items))
            except (StoreError, ConfigError) as error:
                await self._disconnect()
                if monotonic() >= self._give_up_at:
                    remedy = f"{len(items)} messages were not kept here, and the boxes still have them"
                    raise StoreError(error.what, got=error.got, remedy=remedy) from error
                self._complain(error)
            else:
                self._relax()
                return outcomes
            if self._cancelled.is_set():
                await asyncio.sleep(FIRST_PAUSE)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._cancelled.wait(), random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _publish(self, items: Sequence[Item]) -> list[Outcome]:
        connection = await self._connected()
        messages = [message_of(item, connection.limit, connection.limited_by) for item in items]
        known = await connection.publish(messages)
        return [_outcome(message, before) for message, before in zip(messages, known, strict=True)]

    async def _connected(self) -> _Connection:
        if self._connection is None:
            fresh = _Connection(self.address, self._patience)
            try:
                await fresh.open()
            except BaseException:
                await fresh.close()
                raise
            self._connection = fresh
        return self._connection

    async def _disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        self._connection = None

    async def _unless_cancelled(self, trying: Awaitable[_Result]) -> _Result:
        """The result of `trying`, which has GRACE seconds left once `cancel` is called. Raises what it raises."""
        task = asyncio.ensure_future(trying)
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({task, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({task}, timeout=GRACE)
        finally:
            cancelled.cancel()
            if not task.done():
                task.cancel()
        if task.done():
            return task.result()
        raise StoreError(f"NATS at {self.address}: no answer in time")

    def _complain(self, error: LookoutError) -> None:
        """One line when the trouble begins, and one a minute."""
        now = monotonic()
        if self._away_since is None:
            self._away_since, self._log_again = now, 0.0
        if now >= self._log_again:
            self._log_again = now + LOG_SECONDS
            log.warning("%s; trying again, meanwhile the boxes keep their events", error)

    def _relax(self) -> None:
        if self._away_since is not None:
            log.warning("NATS at %s is back after %.0f s", self.address, monotonic() - self._away_since)
            self._away_since = None

    def _wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`, done in the sink's thread. Raises what it raises."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError as error:
            raise StoreError(f"NATS at {self.address}: closed while in use") from error

    def close(self) -> None:
        """Hang up; what waits in `add` raises StoreError."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        await self._disconnect()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)

    def __enter__(self) -> NatsSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _outcome(message: Message, known: bool) -> Outcome:
    if message.refused:
        return Outcome(Kept.REFUSED, message.refused)
    return Outcome(Kept.DUPLICATE if known else Kept.NEW)
