"""The folder that is packed into: what may be there already, what is ours to remove, and the error when it cannot be written."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dtl.data.packing.job import LOCK_NAME
from dtl.data.shards.index import INDEX_NAME, MANIFEST_NAME, PATHS_NAME
from dtl.data.sources.splits import SPLIT_WORDS
from dtl.errors import UserError
from dtl.files import flock, temporary_suffix
from dtl.text import to_stderr

Existing = Literal["refuse", "replace", "join"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.EBUSY)


def prepare_destination(place: Path, existing: Existing) -> Path:
    """Make the destination ready and return the working folder in it. What is not ours is never removed."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; the destination must be a folder")
    # A node of its own: two of them may pack into one cache on a shared disk, each with its own results of half the way.
    work = place / f".packing-{socket.gethostname()}"
    if existing != "join":
        _make_room(place, work, replace=existing == "replace")
    try:
        place.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}") from None
    return work


@contextmanager
def working_alone(work: Path, place: Path, *, quiet: bool = False) -> Iterator[None]:
    """Hold the working folder; a second packing into the same destination on this node is refused.

    Without locks it continues, and prints that unless `quiet`: what two processes write there at the same time may be mixed up.
    """
    with (work / LOCK_NAME).open("a") as file:
        lock = flock(file, wait=False)
        if lock == "busy":
            raise UserError(f"another process is packing into {place} now; wait for it or choose another folder")
        if lock == "none" and not quiet:
            to_stderr(f"{place} is on a file system without locks: start no second process that writes there")
        for folder in (work, *_split_folders(place)) if lock == "held" else ():
            for leftover in folder.glob(f".*{temporary_suffix()}"):
                leftover.unlink(missing_ok=True)
        yield


@contextmanager
def clear_errors(place: Path, *, remove: bool = True, hint: str = "") -> Iterator[None]:
    """A full disk and a folder that cannot be written are one clear line; with `remove` a full disk gets back what was packed."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            if remove:
                remove_ours(place)
                for work in place.glob(".packing-*"):
                    shutil.rmtree(work, ignore_errors=True)
            raise UserError(f"{place}: the disk is full ({error.strerror}); nothing was kept{hint}") from None
        if error.errno in _UNWRITABLE:
            where = f" ({error.filename})" if error.filename and str(error.filename) != str(place) else ""
            raise UserError(f"{place} cannot be written: {error.strerror}{where}{hint}") from None
        raise


def _make_room(place: Path, work: Path, *, replace: bool) -> None:
    packed = [folder for folder in _split_folders(place) if (folder / MANIFEST_NAME).exists()]
    # With our working folder there, a split that is whole already belongs to a packing that was interrupted.
    if packed and not replace and not work.exists():
        raise UserError(f"{place} holds a packed data set already; choose another folder, or replace it with --overwrite")
    strangers = sorted(entry.name for entry in place.iterdir() if not _is_ours(entry)) if place.exists() else []
    if strangers:
        raise UserError(f"{place} is not empty (it holds '{strangers[0]}'{' and more' if len(strangers) > 1 else ''}); choose a new folder")
    for folder in packed:
        (folder / MANIFEST_NAME).unlink()  # first: from here on it is no data set any more
    if not work.exists():
        remove_ours(place)


def _split_folders(place: Path) -> list[Path]:
    return [folder for folder in (place, *(place / name for name in SPLIT_WORDS)) if folder.is_dir()]


def _is_ours(entry: Path) -> bool:
    if entry.is_dir():
        split = entry.name in SPLIT_WORDS and all(_is_ours(inner) and not inner.is_dir() for inner in entry.iterdir())
        return split or entry.name.startswith(".packing-")
    shard = entry.name.startswith("shard-") and entry.suffix == ".tar"
    return shard or entry.name in (MANIFEST_NAME, INDEX_NAME, PATHS_NAME) or (entry.name.startswith(".") and entry.suffix == ".tmp")


def remove_ours(place: Path) -> None:
    """Shards, indexes, manifests; not the working folders."""
    for folder in _split_folders(place):
        for entry in folder.iterdir():
            if not entry.is_dir() and _is_ours(entry):
                entry.unlink(missing_ok=True)
        if folder != place:
            folder.rmdir()
