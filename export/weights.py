"""Official weights: where each file comes from, its sha256, and how it is fetched, continued and checked.

A file is looked for in the mirror folder (air-gapped sites), then in the cache, then at its address. Nothing is ever
returned whose sha256 was not computed in this call from the bytes on the disk.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from edge.bundle import sha256_of
from edge.errors import ConfigError, ModelError

_CHUNK = 1 << 16  # bytes; what is in flight when a connection breaks, and so the most that is asked for twice
_TRANSIENT = frozenset({408, 425, 429})  # HTTP statuses below 500 that a later try may cure

_Seen = Callable[[int, "int | None"], None]  # told (bytes on disk, bytes in all or None)


@dataclass(frozen=True)
class Source:
    """One file of the outer world: its name on disk, its sha256 (64 lower-case hex digits), its http(s) address.

    `bytes`, where known, is the size of the file; it steers progress and resuming, the sha256 alone decides.
    Raises ModelError when name, sum or address cannot be one.
    """

    name: str
    sha256: str
    url: str
    bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name in {"", ".", ".."} or Path(self.name).name != self.name:
            raise ModelError("a source's name must be a bare file name", got=repr(self.name))
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ModelError(f"{self.name}: bad sha256", expected="64 lower-case hex digits", got=repr(self.sha256))
        if not self.url.startswith(("https://", "http://")):
            raise ModelError(f"{self.name}: bad address", expected="http:// or https://", got=repr(self.url))


# Sums and sizes: yolov4.weights and its cfg as published by AlexeyAB's Darknet (608x608); ViT-B-32.pt's sum is part of
# its own address in OpenAI's CLIP (clip/clip.py), its size was never checked; the vocabulary is the file in that
# repository. The cfg's address follows a branch: should the branch move, the sum refuses the new text.
OFFICIAL: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "yolov4.weights",
            "e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562",
            "https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v3_optimal/yolov4.weights",
            257_717_640,
        ),
        Source(
            "yolov4.cfg",
            "a6d0f8e5c62cc8378384f75a8159b95fa2964d4162e33351b00ac82e0fc46a34",
            "https://raw.githubusercontent.com/AlexeyAB/darknet/master/cfg/yolov4.cfg",
            12_231,
        ),
        Source(
            "ViT-B-32.pt",
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            "https://openaipublic.azureedge.net/clip/models/"
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        ),
        Source(
            "bpe_simple_vocab_16e6.txt.gz",
            "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
            "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
            1_356_917,
        ),
    )
}


def cache_folder() -> Path:
    """The default cache: $XDG_CACHE_HOME/lookout, or ~/.cache/lookout where that is unset or (as XDG says) relative."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "lookout"


def fetch(
    source: Source, *, mirror: Path | None, cache: Path, timeout: float = 30.0, tries: int = 4, pause: float = 1.0
) -> Path:
    """Returns the path of a copy of `source` whose sha256 is right: from `mirror`, from `cache`, or downloaded to it.

    `mirror` is the folder a site fills by hand (LOOKOUT_WEIGHTS); it is read, never written. `timeout` is how long, in
    seconds, a connection may stay silent. `tries` connections in a row may fail without bringing the file further;
    between them it waits `pause` seconds, doubled each time. A killed download is continued by the next call.
    Raises ModelError (wrong sum, nothing to be had, disk) and ConfigError (`mirror` is no folder).
    """
    try:
        if mirror is not None and (copy := _from_mirror(source, mirror)):
            return copy
        target = cache / source.name
        if target.is_file() and sha256_of(target) == source.sha256:
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f".{source.name}.lock", source.name):
            if target.is_file():
                if sha256_of(target) == source.sha256:  # the one we waited for has brought it
                    return target
                _say(f"{target} is not the right {source.name}: removed")
                target.unlink()
            part = cache / f"{source.name}.part"
            _download(source, part, timeout=timeout, tries=tries, pause=pause)
            if (got := sha256_of(part)) != source.sha256:
                part.unlink()
                what = f"{source.name} from {source.url} is another file"
                raise ModelError(
                    what, expected=f"sha256 {source.sha256}", got=f"{got}, not kept", remedy=_remedy(source)
                )
            part.replace(target)
            return target
    except OSError as exc:  # the network's own are translated where they arise: what is left is the disk
        raise ModelError(
            f"cannot read or keep {source.name} in {cache}",
            got=exc,
            remedy="mend the folder's rights or free space, or set XDG_CACHE_HOME to another folder",
        ) from exc


def _from_mirror(source: Source, mirror: Path) -> Path | None:
    if not mirror.is_dir():
        # A mistyped mirror must not turn into a download behind the operator's back.
        remedy = "set LOOKOUT_WEIGHTS to an existing folder, or unset it"
        raise ConfigError("the folder for weights does not exist", got=mirror, remedy=remedy)
    copy = mirror / source.name
    if not copy.is_file():
        return None
    if (got := sha256_of(copy)) != source.sha256:  # the file is the user's: refused, never removed
        remedy = "replace it, or take it out of the folder to have it downloaded"
        raise ModelError(f"{copy} is another file", expected=f"sha256 {source.sha256}", got=got, remedy=remedy)
    return copy


@contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """One download of a file at a time; the system drops the lock with the process, so none is ever stale."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another process is fetching it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _BrokenError(Exception):
    """A connection failed in a way that another try may cure; what had arrived is kept."""


def _download(source: Source, part: Path, *, timeout: float, tries: int, pause: float) -> None:
    """Brings `part` to its full length, over as many connections as it takes while they bring it further."""
    furthest, failures = _size(part), 0
    with _progress(source) as seen:
        while True:
            try:
                _receive(source, part, timeout, seen)
                return
            except _BrokenError as exc:
                # Counted from the furthest byte ever reached, so that a server that always restarts cannot hold us.
                failures = 0 if _size(part) > furthest else failures + 1
                furthest = max(furthest, _size(part))
                if failures >= tries:
                    what = f"cannot download {source.name} from {source.url}"
                    raise ModelError(what, got=exc, remedy=_remedy(source)) from exc
            time.sleep(pause * 2 ** max(failures - 1, 0))


def _receive(source: Source, part: Path, timeout: float, seen: _Seen) -> None:
    """One connection: continues `part`, or starts it anew where the server or the part leaves no other way."""
    have = _size(part)
    if source.bytes is not None and have > source.bytes:
        part.unlink()
        have = 0
    if have == source.bytes:  # killed between the last byte and the check
        return
    headers = {"User-Agent": "lookout", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(source.url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as exc:
        with exc:
            if exc.code == 416 and have:
                if _content_range(exc.headers.get("Content-Range")) != (None, have):
                    part.unlink()
                    raise _BrokenError("the part on disk is longer than the file") from exc
                return  # all there
            if exc.code >= 500 or exc.code in _TRANSIENT:
                raise _BrokenError(f"HTTP {exc.code} {exc.reason}") from exc
            what = f"cannot download {source.name} from {source.url}"
            raise ModelError(what, got=f"HTTP {exc.code} {exc.reason}", remedy=_remedy(source)) from exc
    except (OSError, http.client.HTTPException) as exc:
        raise _BrokenError(getattr(exc, "reason", exc)) from exc
    with response:
        total = response.length
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range"))
            if start != have:
                part.unlink(missing_ok=True)
                raise _BrokenError(f"asked for the bytes from {have}, the server sent those from {start}")
        else:
            have = 0  # the server knows no ranges
        total = source.bytes if total is None else total
        with part.open("ab" if have else "wb") as file:
            while total is None or have < total:
                try:
                    # read1 hands over what has come, so that a stall or a cut loses nothing.
                    chunk = response.read1(_CHUNK)
                except (OSError, http.client.HTTPException) as exc:
                    raise _BrokenError(exc) from exc
                if not chunk:
                    break
                file.write(chunk)
                have += len(chunk)
                seen(have, total)
    if total is not None and have < total:
        raise _BrokenError(f"the connection ended at byte {have} of {total}")


def _content_range(header: str | None) -> tuple[int | None, int | None]:
    """(first byte, bytes in all) of `bytes 5-9/10`; either is None where it is not given (`bytes */10`)."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", header or "")
    first, total = (int(number) if number else None for number in (found.groups() if found else (None, None)))
    return first, total


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _remedy(source: Source) -> str:
    return f"put {source.name} into a folder and set LOOKOUT_WEIGHTS=that folder"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(source: Source) -> Iterator[_Seen]:
    """A bar (bytes, speed, time left) on stderr where a person is looking; one line for a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        _say(f"downloading {source.name} from {source.url}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(source.name, total=source.bytes)
        # The first report of a connection also moves the bar to where the part on disk ends.
        yield lambda have, total: progress.update(task, completed=have, total=total)
