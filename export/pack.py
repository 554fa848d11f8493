"""The bundle's folder: written beside the old one, then put in its place in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edge import disk
from edge.bank import PromptBank
from edge.bundle import MANIFEST, PROMPTS, Bundle, Manifest, open_bundle
from edge.errors import ConfigError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def alone(engines: Path) -> Iterator[None]:
    """One export at a time in a folder of bundles. Raises ConfigError while another is at work."""
    engines.mkdir(parents=True, exist_ok=True)
    handle = os.open(engines, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process ends, however it ends
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(f"{engines}: another export is at work here", remedy="wait for its end") from error
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same file system; what is left of it afterwards is removed.

    Raises ConfigError while another export is at work beside it, or where `target` is no folder.
    """
    if target.exists() and (target.is_symlink() or not target.is_dir()):
        raise ConfigError(f"{target}: a bundle is a folder", remedy="move what is there out of the way")
    with alone(target.parent):
        for dead in target.parent.glob(f".{target.name}.*.part"):  # of an export that was killed
            shutil.rmtree(dead, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def bundle_from_parts(folder: Path, manifest: Manifest, bank: PromptBank, target: Path) -> Bundle:
    """Finish `folder`, which holds the files the manifest names, and put it in `target`'s place.

    A reader, or a kill at any moment, finds the old bundle or the new one, whole. Raises BundleError where the parts do
    not fit together, OSError.
    """
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / PROMPTS).write_bytes(bank.to_bytes())
    open_bundle(folder)
    for path in [*folder.iterdir(), folder]:
        disk.sync(path)
    if target.exists():
        _exchange(folder, target)
    else:
        folder.rename(target)
    disk.sync(target.parent)
    return open_bundle(target)


def replace_bank(bundle: Bundle, bank: PromptBank) -> None:
    """Put new words under a bundle, which may be in use: prompts.npz alone changes, in one rename. Raises OSError."""
    part = bundle.file(f".{PROMPTS}.part")
    part.write_bytes(bank.to_bytes())
    disk.sync(part)
    part.replace(bundle.file(PROMPTS))
    disk.sync(bundle.path)


def reuse(old: Mapping[str, Path], folder: Path) -> None:
    """Give `folder` the same files, as hard links where it can: a bundle's files are never written again."""
    for name, path in old.items():
        try:
            os.link(path, folder / name)
        except OSError:
            shutil.copyfile(path, folder / name)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names at once (Linux's renameat2).

    Where the system or the file system cannot, two renames, between which `old` is absent for a moment.
    """
    if sys.platform == "linux":
        swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if swap and swap(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".part", dir=old.parent))
    old.rename(aside / old.name)
    new.rename(old)
    shutil.rmtree(aside)
