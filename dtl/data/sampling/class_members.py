"""The samples of each class, as a file in the cache: built once on each node, memory-mapped by all its processes.

One sample id for each sample (4 bytes, 8 beyond 2^32 samples), sorted by class and then by id. It is made in one pass over the index, a million
labels at a time. So neither making nor using it needs memory that grows with the dataset.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.remote.address import cache_place
from dtl.data.shards.index import Shards
from dtl.errors import UserError
from dtl.files import write_whole

_MAGIC = b"DTLCLASS"
_HEADER = struct.Struct("<8sII")  # magic, bytes a number, crc32 of the numbers
_CHUNK = 1_000_000


@dataclass(frozen=True)
class ClassMembers:
    """`members[starts[c] : starts[c + 1]]` are the samples of class c, growing."""

    starts: npt.NDArray[np.int64]
    """[K + 1]"""
    members: npt.NDArray[Any]
    """[N] uint32 or uint64"""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    @classmethod
    def of_labels(cls, labels: npt.ArrayLike, num_classes: int) -> ClassMembers:
        """In memory, for labels that are all within the classes."""
        found = np.asarray(labels, np.int64)
        starts = np.concatenate([[0], np.cumsum(np.bincount(found, minlength=num_classes))]).astype(np.int64)
        return cls(starts, np.argsort(found, kind="stable").astype(_kind(len(found))))

    @classmethod
    def of_shards(cls, shards: Shards, *, cache_dir: str | Path | None = None, shared: bool = False) -> ClassMembers:
        """From the cache, where it is built if it is missing. UserError if a label is not one of the classes."""
        place = cache_place(cache_dir, shared=shared) / "by-class"
        path = place / f"{shards.manifest.index_sha256}.bin"
        starts = _starts(shards)
        found = _read(path, shards.num_samples)
        if found is None:
            try:
                place.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: _fill(file, shards, starts))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}; choose another cache (data.cache_dir or $DTL_CACHE)") from None
            found = _read(path, shards.num_samples)
        if found is None:
            raise UserError(f"{path} was written, but reading it back gives different bytes; check this disk")
        return cls(starts, found)


def _kind(num_samples: int) -> str:
    return "<u4" if num_samples <= 2**32 else "<u8"


def _starts(shards: Shards) -> npt.NDArray[np.int64]:
    """From the counts of the manifest, after a look at every label."""
    counts, bad = np.zeros(shards.num_classes, np.int64), 0
    for first in range(0, shards.num_samples, _CHUNK):
        labels = shards.labels[first : first + _CHUNK]
        sound = labels[(labels >= 0) & (labels < shards.num_classes)]
        bad += len(labels) - len(sound)
        counts += np.bincount(sound, minlength=shards.num_classes)
    if bad:
        raise UserError(
            f"{shards.index_path}: {bad} of {shards.num_samples} labels are not among the {shards.num_classes} classes, and data.balance draws by "
            f"class; leave these samples out with `dtl verify {quote(str(shards.folder))} --quarantine`"
        )
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _fill(file: Any, shards: Shards, starts: npt.NDArray[np.int64]) -> None:
    """A counting sort, straight into the file."""
    kind = np.dtype(_kind(shards.num_samples))
    file.truncate(_HEADER.size + shards.num_samples * kind.itemsize)
    members = np.memmap(file.name, kind, "r+", offset=_HEADER.size, shape=(shards.num_samples,))
    free = starts[:-1].copy()
    for first in range(0, shards.num_samples, _CHUNK):
        labels = np.asarray(shards.labels[first : first + _CHUNK])
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=len(free))
        members[np.repeat(free - np.cumsum(counts) + counts, counts) + np.arange(len(labels))] = first + order
        free += counts
    members.flush()
    file.write(_HEADER.pack(_MAGIC, kind.itemsize, _crc(Path(file.name))))


def _read(path: Path, num_samples: int) -> npt.NDArray[Any] | None:
    """None where it is not there or not whole."""
    kind = np.dtype(_kind(num_samples))
    try:
        with path.open("rb") as file:
            magic, itemsize, crc = _HEADER.unpack(file.read(_HEADER.size))
        size = path.stat().st_size
        if magic != _MAGIC or itemsize != kind.itemsize or size != _HEADER.size + num_samples * kind.itemsize or _crc(path) != crc:
            return None
    except (OSError, struct.error):
        return None
    return map_members(path, kind, num_samples, offset=_HEADER.size)


def map_members(path: Path, kind: Any, num_samples: int, *, offset: int) -> npt.NDArray[Any]:
    """Mapped for reading here and there: nothing is read ahead."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, kind, num_samples, offset)


def _crc(path: Path) -> int:
    """CRC of the bytes after the header; read, not mapped, so that they do not count as memory of this process."""
    crc = 0
    with path.open("rb") as file:
        file.seek(_HEADER.size)
        while block := file.read(4 * _CHUNK):
            crc = zlib.crc32(block, crc)
    return crc
