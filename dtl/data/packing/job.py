"""The working folder of one packing: all that its processes need, on disk, so that they start empty and an interrupted one resumes.

    job.json           what is packed and how; the folder of another job is not resumed. Only the main process reads it, and gives it to the others
    names.bin, labels.npy, [images.npy]     the source's columns, mapped by every process
    members.npy, [bundle.bin]               of a source in one file: where in it each image is, and a copy of them all where the file itself is not read
    scan-00000.npy     what reading a chunk of images found (SCAN), .json beside it the reasons of the unreadable
    SPLIT.order.npy    sample numbers in packed order, SPLIT.cuts.npy where each shard begins
    SPLIT-00000.npy    index columns of a finished shard (ROWS), .json beside it its bytes and sha256

Every file here and every shard appears under its name only when it is complete. Only shards are flushed to the disk, though: after a power cut
a result of this folder may be empty, so it is checked when it is used again.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dtl.data.decoding.headers import MAX_PIXELS
from dtl.data.decoding.png import store_png
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import ALL, WHOLE, ZIP_DEFLATED, Source
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, TEMPORARY, open_regular, read_regular, write_whole
from dtl.untrusted import read_json

PACK_VERSION = 2  # part of a job's identity: a change of what is written starts afresh

LOCK_NAME = "lock"
MADE = re.compile(
    rf"{LOCK_NAME}|job\.json|names\.bin|(labels|images|members|scanned)\.npy|bundle\.bin|scan-\d{{5,}}\.(npy|json)"
    r"|(all|train|val|test)(-\d{5,}\.(npy|json)|\.(order|cuts)\.npy)|" + TEMPORARY + r"\..*\.tmp"
)
"""The names of all files here: nothing else is deleted."""

GOOD, UNREADABLE, DOUBTFUL = 0, 1, 2
SCAN = np.dtype(
    [("hash", "<u8"), ("dhash", "<u8", (2,)), ("low", "<f8"), ("high", "<f8"), ("size", "<u4"), ("crc", "<u4"), ("width", "<u2"), ("height", "<u2")]
    + [(name, "u1") for name in ("format", "orientation", "wide", "state")]
)
"""Width and height as stored; `low` and `high` are the bounds of the values of a `wide` image, of more than 8 bits."""
ROWS = np.dtype([("offsets", "<u8"), ("sizes", "<u4"), ("crcs", "<u4"), ("labels", "<i4"), ("widths", "<u2"), ("heights", "<u2"), ("flags", "u1")])


@dataclass(frozen=True)
class PackOptions:
    """What decides the packed bytes, beside the source. `verify`: decode each image fully when reading it first."""

    val_fraction: float = 0.0
    shard_bytes: int = 128 * 2**20
    seed: int = 0
    on_error: str = "fail"
    max_side: int | None = None
    short_side: int | None = None
    quality: int = 95
    verify: bool = True
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES
    group_column: str | None = None
    """Of the list that is packed: what is split off are whole groups of it."""

    def check(self) -> None:
        """UserError for values that are wrong."""
        if self.on_error not in ("fail", "skip"):
            raise UserError(f"on_error must be 'fail' or 'skip', got '{self.on_error}'")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"the validation fraction must be 0 or more and less than 1, got {self.val_fraction}")
        for name in ("max_side", "short_side", "shard_bytes", "max_pixels", "max_file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be between 1 and 100, got {self.quality}")


class Job:
    """A working folder, opened by the main process or by a worker."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """`facts`: see `job_facts`."""
        self.folder, self.facts = folder, facts
        self.options = PackOptions(**self.facts["options"])
        self.destination = folder.parent
        self.root = Path(self.facts["root"]) if self.facts["root"] is not None else None
        self.names = StringTable.read(folder / "names.bin")
        self.labels: npt.NDArray[np.int32] = np.load(folder / "labels.npy", mmap_mode="r")
        self.images = np.load(folder / "images.npy", mmap_mode="r") if self.root is None else None
        self.members: npt.NDArray[np.void] | None = None
        if (folder / "members.npy").exists():
            self.members = np.load(folder / "members.npy", mmap_mode="r")
            copied = folder / "bundle.bin"
            self._bundle = copied if copied.exists() else Path(self.facts["root"])

    @classmethod
    def create(cls, folder: Path, source: Source, options: PackOptions) -> Job:
        """Begin, or go on where the folder is of the same job. `job.json` is written last, so a folder that has it is complete."""
        if not cls.is_of(folder, source, options):
            remove_leftovers(folder)
        source.names.write(folder / "names.bin")
        np.save(folder / "labels.npy", source.labels)
        if source.images is not None:
            np.save(folder / "images.npy", source.images)
        if source.bundle is not None and not (folder / "members.npy").exists():
            members = source.bundle.members
            if source.bundle.write is not None:
                found: list[npt.NDArray[np.void]] = []
                copy = source.bundle.write
                write_whole(folder / "bundle.bin", lambda file: found.append(copy(file, options.max_file_bytes)), sync=False)
                members = found[0]
            assert members is not None
            write_array(folder / "members.npy", members)
        facts = job_facts(source, options)
        write_json(folder / "job.json", facts)
        return cls(folder, facts)

    @staticmethod
    def is_of(folder: Path, source: Source, options: PackOptions) -> bool:
        """Whether the folder holds a job of this source and these options, so that it can be resumed."""
        try:
            return bool(read_json(folder / "job.json") == job_facts(source, options))
        except (OSError, UserError):
            return False

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def chunk_samples(self) -> int:
        """Samples per scan task: a function of N alone, so that an interrupted scan can resume with another number of processes."""
        return min(max(self.num_samples // 64, 32), 1024)

    def chunk(self, number: int) -> tuple[range, Path]:
        """The samples of a scan task, and the file of what it found."""
        start = number * self.chunk_samples
        return range(start, min(start + self.chunk_samples, self.num_samples)), self.folder / f"scan-{number:05d}.npy"

    def read(self, sample: int) -> bytes:
        """The bytes of one image in the source. OSError where the file cannot be read; UserError where it is not a regular file, or too large."""
        if self.images is not None:
            return store_png(self.images[sample])
        if self.members is not None:
            with open_regular(self._bundle) as file:
                return _read_member(file, self.members[sample], max_bytes=self.options.max_file_bytes)
        assert self.root is not None
        return read_regular(self.root / self.names[sample], max_bytes=self.options.max_file_bytes)

    def split_folder(self, split: str) -> Path:
        """Where a split's shards go: the destination itself where the source has no splits."""
        return self.destination if split == ALL else self.destination / split

    def is_finished(self, split: str) -> bool:
        """A split is finished by its manifest: by us before an interruption, or by another node that packs the same."""
        return (self.split_folder(split) / MANIFEST_NAME).exists()


def _read_member(file: BinaryIO, member: Any, *, max_bytes: int) -> bytes:
    """One image out of a larger file, checked against what that says of it."""
    offset, stored, size, how = (int(member[name]) for name in ("offset", "stored", "size", "how"))
    if max(stored, size) > max_bytes:
        raise UserError(f"it has {max(stored, size):,} bytes, more than the {max_bytes:,} that are allowed for such a file")
    if how != WHOLE:
        header = os.pread(file.fileno(), 30, offset)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise UserError("its place in the archive holds something else; the archive is damaged")
        offset += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = os.pread(file.fileno(), stored, offset)
    if how == ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise UserError(f"it cannot be unpacked ({error}); the archive is damaged") from None
    if len(data) != size or (how != WHOLE and zlib.crc32(data) != int(member["crc"])):
        raise UserError("its bytes are not those that the archive was made of; the archive is damaged")
    return data


def remove_leftovers(folder: Path) -> None:
    """All but the lock, of a working folder that is held."""
    for leftover in folder.iterdir():
        if leftover.name != LOCK_NAME:
            leftover.unlink(missing_ok=True)


def job_facts(source: Source, options: PackOptions) -> dict[str, Any]:
    root = None if source.root is None else str(source.root.resolve())
    return {"pack_version": PACK_VERSION, "source": source.fingerprint, "root": root, "options": asdict(options)}


def write_json(path: Path, value: Any) -> None:
    write_whole(path, lambda file: file.write(json.dumps(value, ensure_ascii=True).encode()), sync=False)


def load_rows(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """What `write_array` wrote; UserError where it is anything else. NumPy refuses pickled objects."""
    most = count * dtype.itemsize + (1 << 16)
    try:
        rows = np.load(io.BytesIO(read_regular(path, max_bytes=most)))
    except (ValueError, EOFError, MemoryError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != dtype or rows.shape != (count,):
        raise UserError(f"{path} does not hold {count} rows of its kind")
    return rows


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, lambda file: file.write(buffer.getvalue()), sync=False)
