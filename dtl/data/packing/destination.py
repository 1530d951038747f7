"""The folder that is packed into: what may be there already, what is ours to remove, and the error when it cannot be written."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dtl.data.packing.job import LOCK_NAME, MADE
from dtl.data.shards.index import DHASHES_NAME, GROUPS_NAME, INDEX_NAME, PATHS_NAME
from dtl.data.shards.manifest import INDEXED, MANIFEST_NAME
from dtl.data.sources.splits import SPLIT_WORDS
from dtl.errors import UserError
from dtl.files import TEMPORARY, clear_folder, flock, make_folder, open_lock, temporary_suffix
from dtl.text import to_stderr
from dtl.untrusted import read_json

Existing = Literal["refuse", "replace", "join"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.EBUSY)


def prepare_destination(place: Path, existing: Existing) -> Path:
    """Check the destination and return the working folder in it. Nothing is removed yet: another process may be packing into it."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; the destination must be a folder")
    # A node of its own: two of them may pack into one cache on a shared disk, each with its own intermediate results.
    work = place / f".packing-{socket.gethostname()}"
    interrupted = work.exists()
    if existing != "join":
        _check_room(place, interrupted=interrupted, replace=existing == "replace")
    try:
        place.mkdir(parents=True, exist_ok=True)
        make_folder(work)  # before anything goes: it marks a half-deleted folder as ours
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}") from None
    return work


@contextmanager
def working_alone(work: Path, place: Path, made: re.Pattern[str], *, quiet: bool = False) -> Iterator[None]:
    """Hold the working folder; a second packing into the same destination on this node is refused.

    What is in it under other names than `made` is somebody else's, and refused: the folder is cleared at the end.
    Without locks it continues, and prints that unless `quiet`: what two processes write there at the same time may be mixed up.
    """
    with open_lock(work / LOCK_NAME) as file:
        lock = flock(file, wait=False)
        if lock == "busy":
            raise UserError(f"another process is packing into {place} now; wait for it or choose another folder")
        if lock == "none" and not quiet:
            to_stderr(f"{place} is on a file system without locks: do not start a second process that writes there")
        with os.scandir(work) as found:
            others = sorted(entry.name for entry in found if not (made.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)))
        if others:
            raise UserError(f"{work}: it holds '{others[0]}', which dtl did not make; move it out of this folder, or choose another destination")
        temporary = re.compile(TEMPORARY + re.escape(temporary_suffix()))
        for folder in (work, *_split_folders(place)) if lock == "held" else ():
            for leftover in folder.iterdir():
                if temporary.fullmatch(leftover.name) and (leftover.is_symlink() or not leftover.is_dir()):
                    leftover.unlink(missing_ok=True)
        yield


@contextmanager
def clear_errors(place: Path, *, work: Path | None = None, hint: str = "") -> Iterator[None]:
    """A full disk and a folder that cannot be written are one clear line. With `work`, a working folder that is held, a full disk gets back what was packed."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            if work is not None:
                remove_ours(place)
                clear_folder(work, MADE)
            raise UserError(f"{place}: the disk is full ({error.strerror}); nothing was kept{hint}") from None
        if error.errno in _UNWRITABLE:
            where = f" ({error.filename})" if error.filename and str(error.filename) != str(place) else ""
            raise UserError(f"{place} cannot be written: {error.strerror}{where}{hint}") from None
        raise


def _check_room(place: Path, *, interrupted: bool, replace: bool) -> None:
    """UserError unless the destination is new, empty, or holds what dtl has packed, completely or (`interrupted`) in part."""
    packed = [folder for folder in _split_folders(place) if (folder / MANIFEST_NAME).exists()]
    # With our working folder there, a complete split belongs to a packing that was interrupted.
    if packed and not replace and not interrupted:
        raise UserError(f"{place} already holds a packed data set; choose another folder, or replace it with --overwrite")
    others = sorted(entry.name for entry in place.iterdir() if not _is_ours(entry)) if place.exists() else []
    indexed = [folder for folder in packed if not _is_packed(folder)]
    # Other tools use the same names of shards: without a manifest of dtl beside them they are not ours.
    begun = any(place.glob(".packing-*"))
    loose = [] if begun else [entry for folder in _split_folders(place) if folder not in packed for entry in folder.iterdir() if entry.suffix == ".tar"]
    found = [*others, *(MANIFEST_NAME for _ in indexed), *(entry.name for entry in loose)]
    if found:
        ours = "" if others else " that dtl did not pack"
        raise UserError(f"{place} is not empty (it holds '{found[0]}'{' and more' if len(found) > 1 else ''}{ours}); choose a new folder")


def make_room(place: Path, *, go_on: bool) -> None:
    """Remove what was packed into a destination that was checked and is held; to `go_on` with it, the manifests alone. What is not ours stays."""
    for folder in _split_folders(place):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: without it the folder is not a data set
    if not go_on:
        remove_ours(place)


def _is_packed(folder: Path) -> bool:
    """Whether a manifest is one that packing wrote: beside an index of tars that others made, the tars are theirs."""
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except (OSError, UserError):
        return False
    return isinstance(manifest, dict) and "dataset_id" in manifest and (manifest.get("made_by") or {}).get("source") != INDEXED


def _split_folders(place: Path) -> list[Path]:
    return [folder for folder in (place, *(place / name for name in SPLIT_WORDS)) if folder.is_dir() and (folder == place or not folder.is_symlink())]


def _is_ours(entry: Path) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        split = entry.name in SPLIT_WORDS and all(_is_ours(inner) and not inner.is_dir() for inner in entry.iterdir())
        return split or entry.name.startswith(".packing-")
    shard = entry.name.startswith("shard-") and entry.suffix == ".tar"
    return shard or entry.name in (MANIFEST_NAME, INDEX_NAME, PATHS_NAME, GROUPS_NAME, DHASHES_NAME) or (entry.name.startswith(".") and entry.suffix == ".tmp")


def remove_ours(place: Path) -> None:
    """Shards, indexes, manifests; not the working folders."""
    for folder in _split_folders(place):
        for entry in folder.iterdir():
            if not entry.is_dir() and _is_ours(entry):
                entry.unlink(missing_ok=True)
        if folder != place:
            folder.rmdir()
