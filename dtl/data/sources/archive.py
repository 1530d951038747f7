"""An archive of class folders as a source: a zip, or a tar, also a compressed one. Nothing of it is unpacked into files.

The images of a zip and of a plain tar are read where they are. A compressed tar has no such places, so packing first copies it decompressed
into its working folder, as one file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from dtl.data.sources.base import IMAGE_EXTENSIONS, MEMBER, WHOLE, ZIP_DEFLATED, ZIP_STORED, Bundle, Source
from dtl.data.sources.folder import open_folder
from dtl.data.sources.splits import split_named
from dtl.data.sources.tree import Entry
from dtl.data.wds.tar import DamagedTar, TarFile
from dtl.errors import UserError
from dtl.files import open_regular

_STREAMS: tuple[tuple[bytes, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
_UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError)
_HOW = {zipfile.ZIP_STORED: ZIP_STORED, zipfile.ZIP_DEFLATED: ZIP_DEFLATED}
_MOST_DEPTH, _LONGEST_NAME = 64, 4096
# A compressed tar may unpack to so many times its size: archives of photos to 1.0, of flat drawings to 20; zeros would to 1,000.
_MOST_TIMES, _LEAST_LIMIT = 100, 1 << 30
_LOOKED_AT = 64  # members, to tell what kind of tar it is


class _File(NamedTuple):
    """A regular file of an archive, and where it lies."""

    name: str
    offset: int
    stored: int
    size: int
    crc: int
    how: int


def open_archive(path: Path, *, classes: Sequence[str] | None, names: str | Path | None, on_error: str, labelled: bool = True) -> Source:
    """List the images of an archive as those of a folder. See `open_source`. UserError where it is damaged, encrypted, or no archive."""
    if _first_images(path)[1]:
        raise UserError(f"{path} is a WebDataset shard, with labels beside its images: train on it as it is, or index it: dtl index {quote(str(path))}")
    files, num_bytes = _files(path)
    tree = _Archive(path, files)
    source = open_folder(tree, classes=classes, names=names, on_error=on_error, labelled=labelled)
    members = np.zeros(source.num_samples, MEMBER)
    for row in range(source.num_samples):
        members[row] = tree.files[source.names[row]][1:]
    if not _is_compressed(path):
        return replace(source, bundle=Bundle(members=members))

    def unpack(file: BinaryIO, max_bytes: int) -> npt.NDArray[np.void]:
        _unpack(path, file, num_bytes)
        return members

    return replace(source, bundle=Bundle(write=unpack))


def is_tar_of_folders(path: Path) -> bool:
    """Whether a tar is one of folders for `open_archive`, by its first members: its images have no labels beside them, and it is compressed,
    or has folders for splits. Other tars of class folders are used where they are, as WebDataset shards.
    """
    images, labelled = _first_images(path)
    if not images or labelled:
        return False
    return _is_compressed(path) or any(split_named(part) for name in images for part in name.split("/")[:-2])


def _first_images(path: Path) -> tuple[list[str], bool]:
    """The first images of a tar that lie in folders, and whether labels lie beside images, as in a WebDataset shard."""
    try:
        with _open_tar(path) as tar:
            first = list(islice(tar.members(lambda name, size: False), _LOOKED_AT))
    except (DamagedTar, UserError, *_UNPACKING):
        return [], False
    images = [member.name for member in first if os.path.splitext(member.name)[1].lower() in IMAGE_EXTENSIONS]
    labels = {member.name.partition(".")[0] for member in first if member.name.endswith((".cls", ".json"))}
    return [name for name in images if "/" in name.removeprefix("./")], any(name.partition(".")[0] in labels for name in images)


class _Archive:
    """The tree of an archive's names."""

    is_archive = True

    def __init__(self, path: Path, files: list[_File]) -> None:
        self.root, self.kind = path, "zip archive" if files and files[0].how != WHOLE else "tar archive"
        self._mtime = path.stat().st_mtime_ns
        self.files: dict[str, _File] = {}
        self._folders: dict[str, dict[str, _File | None]] = {"": {}}
        for file in files:
            self._add(file)

    def _add(self, file: _File) -> None:
        name = _checked_name(self.root, file.name)
        folder, _, last = name.rpartition("/")
        if self._folder(folder, name).setdefault(last, file) is not file:
            raise UserError(f"{self.root} holds '{name}' twice; write the archive again")
        self.files[name] = file

    def _folder(self, place: str, name: str) -> dict[str, _File | None]:
        found = self._folders.get(place)
        if found is None:
            above, _, last = place.rpartition("/")
            if self._folder(above, name).setdefault(last, None) is not None:
                raise UserError(f"{self.root} holds '{place}' as a file, and '{name}' in it; write the archive again")
            found = self._folders[place] = {}
        return found

    def entries(self, place: str) -> list[Entry]:
        inside = self._folders.get("" if place == "." else place)
        if inside is None:
            raise UserError(f"{self.root} has no folder {place}")
        return [Entry(name, file is None, partial(self._size_and_time, file)) for name, file in sorted(inside.items())]

    def _size_and_time(self, file: _File | None) -> tuple[int, int]:
        return 0 if file is None else file.size, self._mtime

    def identity(self, place: str) -> Hashable:
        return place


def _checked_name(path: Path, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or len(parts) > _MOST_DEPTH or len(name) > _LONGEST_NAME or "\0" in name or not parts:
        raise UserError(f"{path}: the name of a member is not one of a file below its folder: '{name[:200]}'; unpack it with a tool that you trust")
    return "/".join(parts)


def _files(path: Path) -> tuple[list[_File], int]:
    """All regular files of an archive, and the bytes of a tar, decompressed."""
    try:
        with open_regular(path) as file:
            if file.read(2) == b"PK":
                return list(_zip_files(path, file)), 0
        with _open_tar(path) as tar:
            files = [_File(member.name, member.offset, member.size, member.size, 0, WHOLE) for member in tar.members(lambda name, size: False)]
            return files, tar.num_bytes
    except DamagedTar as error:
        raise UserError(f"{path} is damaged, or not an archive: {error}") from None
    except _UNPACKING as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _zip_files(path: Path, file: BinaryIO) -> Iterator[_File]:
    try:
        listed = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{path} is not a complete zip archive: {error}") from None
    if sum(info.compress_size for info in listed) > os.fstat(file.fileno()).st_size:
        raise UserError(f"{path} has members that overlap; it is not an archive that a packing tool writes")
    if any(info.header_offset < 0 for info in listed):
        raise UserError(f"{path} is not a complete zip archive: its beginning is missing")
    for info in listed:
        name = info.filename.replace("\\", "/")  # as some tools of Windows write it
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or name.endswith("/"):
            continue
        if kind not in (0, stat.S_IFREG):
            raise UserError(f"{path}: member '{name[:200]}' is a link or a device, not a regular file; write the archive again without links")
        if info.flag_bits & 0x1:
            raise UserError(f"{path} is encrypted (member '{name[:200]}'); unpack it, and give the folder")
        if info.compress_type not in _HOW:
            raise UserError(f"{path} is compressed by a method that is not read here ({info.compress_type}; read is deflate); unpack it, and give the folder")
        yield _File(name, info.header_offset, info.compress_size, info.file_size, info.CRC, _HOW[info.compress_type])


def _is_compressed(path: Path) -> bool:
    with open_regular(path) as file:
        start = file.read(8)
    return any(start.startswith(magic) for magic, _ in _STREAMS)


@contextmanager
def _open_tar(path: Path) -> Iterator[TarFile]:
    with _opened(path) as (file, limit):
        yield TarFile(file, str(path), unpacked=limit, quick=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The tar's bytes, and the most that there may be where they are decompressed while they are read."""
    with open_regular(path) as file:
        start = file.read(8)
        file.seek(0)
        stream = next((stream for magic, stream in _STREAMS if start.startswith(magic)), None)
        if stream is None:
            yield file, None
            return
        with stream(file) as unpacked, io.BufferedReader(unpacked, 1 << 20) as buffered:
            yield cast(BinaryIO, buffered), max(_LEAST_LIMIT, _MOST_TIMES * os.fstat(file.fileno()).st_size)


def _unpack(path: Path, target: BinaryIO, num_bytes: int) -> None:
    """Copy a compressed tar, decompressed. UserError where it has changed since it was listed."""
    begun = target.tell()
    try:
        with _opened(path) as (source, _):
            left = num_bytes + 1
            while left and (data := source.read(min(left, 1 << 20))):
                target.write(data)
                left -= len(data)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if target.tell() - begun != num_bytes:
        raise UserError(f"{path} changed while it was packed; run the same command again when nothing writes to it")
