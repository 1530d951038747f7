"""Folders and files below a root, on a disk or inside of an archive: all that finding classes and splits has to know of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from dtl.data.sources.splits import is_hidden
from dtl.errors import UserError


class Entry(NamedTuple):
    """`size_and_time()`: of a file, in bytes and nanoseconds; asked for images only, since a disk has to look."""

    name: str
    is_folder: bool
    size_and_time: Callable[[], tuple[int, int]]


class Tree(Protocol):
    """A place is a path below the root, with slashes; "" or "." is the root itself."""

    root: Path
    kind: str
    is_archive: bool

    def entries(self, place: str) -> list[Entry]:
        """Sorted by name. UserError where they cannot be listed."""
        ...

    def identity(self, place: str) -> Hashable:
        """The same for a folder that is reached by two ways."""
        ...


class Folder:
    """A folder of a disk; links are followed."""

    kind, is_archive = "image folder", False

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, place: str) -> list[Entry]:
        folder = self.root / place
        try:
            with os.scandir(folder) as found:
                return sorted(Entry(entry.name, _is_folder(entry), partial(_size_and_time, entry)) for entry in found)
        except OSError as error:
            raise UserError(f"{folder} cannot be listed: {error.strerror}") from None

    def identity(self, place: str) -> Hashable:
        status = os.stat(self.root / place)
        return status.st_dev, status.st_ino


def folders_in(tree: Tree, place: str) -> list[str]:
    """The folders in `place`, sorted, without hidden ones; none where it cannot be listed."""
    try:
        return [entry.name for entry in tree.entries(place) if entry.is_folder and not is_hidden(entry.name)]
    except UserError:
        return []


def joined(place: str, name: str) -> str:
    """The place of `name` in `place`."""
    return name if place in ("", ".") else f"{place}/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return 0, 0  # a broken link: packing lists it as unreadable
    return status.st_size, status.st_mtime_ns
