"""Packed shards, opened: `index.bin` has the place of each sample, so any sample is one `pread` away and damage is noticed.

index.bin, little-endian: magic, version, number of shards S, number of samples N, then columns one after another:
samples per shard i64[S], offset u64[N], size u32[N], crc32 u32[N], label i32[N], width u16[N], height u16[N], flags u8[N].
Width and height are those of the image as its EXIF orientation has it, which stands in the flags.
Sample number = position in packed order: the samples of shard 0, then those of shard 1 ...
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dtl.data.decoding.decode import FORMATS
from dtl.data.decoding.headers import DEFAULT_LIMITS, Limits
from dtl.data.remote.address import is_remote, shown
from dtl.data.remote.cache import ShardCache, open_cache
from dtl.data.remote.fetch import Unfetched
from dtl.data.shards.manifest import MANIFEST_NAME, Manifest, Shard, check_class_maps, dataset_id
from dtl.data.shards.part import NUMBERS_NAME, PART_NAME, Part
from dtl.data.shards.quarantine import Quarantine, original_number
from dtl.data.shards.strings import StringTable
from dtl.errors import DamagedSample, UnreachableSample, UserError
from dtl.files import open_descriptor, open_regular, sha256_of_file, write_whole

if TYPE_CHECKING:
    from dtl.config.models import DataConfig

__all__ = [
    "INDEX_NAME",
    "KEYS_NAME",
    "MANIFEST_NAME",
    "PATHS_NAME",
    "Manifest",
    "Shard",
    "Shards",
    "check_class_maps",
    "dataset_id",
    "write_index",
]

INDEX_NAME = "index.bin"
PATHS_NAME = "paths.bin"
GROUPS_NAME = "groups.bin"  # of each sample, as in paths.bin, and at the end the name of their column
DHASHES_NAME = "dhashes-1.npy"  # of each sample, see `dtl.data.dhash`; the number is its version
KEYS_NAME = "keys.bin"  # of shards made by others, whose headers may hold less than the whole name
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # in version 1 no image is turned

_MAGIC = b"DTLINDEX"
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, shards, samples, zero
_COLUMNS = (
    ("offsets", "<u8"),
    ("sizes", "<u4"),
    ("crcs", "<u4"),
    ("labels", "<i4"),
    ("widths", "<u2"),
    ("heights", "<u2"),
    ("flags", "u1"),
)
ROW_COLUMNS = tuple(name for name, _ in _COLUMNS)
_BLOCK = 512  # of a tar
Sides = npt.NDArray[np.int64]

# flags: the low 4 bits are the image's format, 1 + its place in FORMATS; the next 3 its EXIF orientation - 1.
FORMAT_FLAGS = {name: number for number, name in enumerate(FORMATS, start=1)}
_TURN_BITS, _TURN_MASK = 4, 7


def flags_of(format: str, orientation: int) -> int:
    return FORMAT_FLAGS[format] | (orientation - 1) << _TURN_BITS


MAX_OPEN_SHARDS = 128  # of one process

# Neighbours in a shard are read together; two samples of our own are about 2 KB of headers apart.
_GAP_BYTES = 64 * 1024
_READ_BYTES = 1024 * 1024  # larger blocks are new pages each time, which cost more than another read


def index_bytes(num_shards: int, num_samples: int) -> int:
    """The size of index.bin."""
    return _HEADER.size + 8 * num_shards + num_samples * sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)


def write_index(path: Path, shard_sizes: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[Any]]) -> str:
    """Write index.bin whole and return its sha256. `columns` are named as in `Shards`."""
    num_samples = int(np.sum(shard_sizes))
    parts: list[Any] = [
        _HEADER.pack(_MAGIC, FORMAT_VERSION, len(shard_sizes), num_samples, 0),
        np.ascontiguousarray(shard_sizes, "<i8").data,
    ]
    for name, kind in _COLUMNS:
        assert len(columns[name]) == num_samples, (name, len(columns[name]), num_samples)
        parts.append(np.ascontiguousarray(columns[name], kind).data)
    write_whole(path, lambda file: file.writelines(parts))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class Shards:
    """One packed split, opened for reading samples by number.

    The columns `labels` int32, `widths`, `heights` uint16, `flags` uint8, `offsets` uint64, `sizes`, `crcs` uint32, each [N], and
    `shard_sizes` int64 [S] are mapped from the index: all processes of a node share them. Pickles as its folder and manifest.
    Remote shards are read through `cache`, which is None where all of them are local.
    """

    manifest: Manifest
    folder: Path
    shard_sizes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint32]
    crcs: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.int32]
    widths: npt.NDArray[np.uint16]
    heights: npt.NDArray[np.uint16]
    flags: npt.NDArray[np.uint8]

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        quarantine: Quarantine | None = None,
        cache: ShardCache | None = None,
        limits: Limits = DEFAULT_LIMITS,
        part: tuple[Path, int] | None = None,
    ) -> None:
        """Use `Shards.open`, which also checks that the index belongs to the manifest. `manifest` has the quarantine applied.

        `part`: these are some of the folder's samples (see `dtl.data.shards.part`): where their index lies, and how many rows the folder's own has.
        """
        self.folder, self.manifest, self.quarantine, self.cache, self.part = folder, manifest, quarantine, cache, part
        self.limits = limits
        self.quarantined = np.zeros(0, np.int64) if quarantine is None else quarantine.numbers
        self._map_index()
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shard_sizes)])
        self._files = _OpenFiles()
        self._tables: dict[str, StringTable | None] = {}
        self._numbers: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, folder: str | Path, options: DataConfig | None = None, *, whole: bool = False, checked: bool = False) -> Shards:
        """Open a folder written by `dtl pack` or `dtl index`. UserError where the index is missing, short, or of another manifest.

        Samples in quarantine (`quarantine.json`, by `dtl verify --quarantine`) are left out, unless the split is wanted `whole`.
        `options`: how remote shards are cached, and how large an image may be. `checked`: another process of this node has
        just opened it, and need not read the whole index again to see that it is sound.
        """
        place = Path(folder)
        part = Part.of_folder(place)
        folder = place if part is None else Path(part.folder)
        manifest = Manifest.read(folder)
        cache = open_cache(manifest, folder, options)
        quarantine = None if whole else Quarantine.of_folder(folder, manifest)
        if quarantine is not None:
            manifest = quarantine.applied(manifest)
        if part is not None:
            manifest, quarantine = part.applied(manifest, place), None
        limits = DEFAULT_LIMITS if options is None else Limits(options.max_pixels, options.max_file_bytes)
        shards = cls(folder, manifest, quarantine, cache, limits, None if part is None else (place, part.rows))
        if not checked and sha256_of_file(shards.index_path) != manifest.index_sha256:
            raise UserError(f"{shards.index_path} does not belong to the {MANIFEST_NAME} beside it (its sha256 differs); {shards.again}")
        if not checked:
            shards._check_counts()
        return shards

    def _check_counts(self) -> None:
        """UserError where the manifest's counts are not those of the rows. Labels out of range are damaged samples, which have a name of their own."""
        if not self.num_samples or self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            return
        counts = np.bincount(self.labels, minlength=self.num_classes)
        wrong = np.flatnonzero(counts != np.array(self.manifest.class_counts))
        if len(wrong):
            one = int(wrong[0])
            raise UserError(
                f"{self.folder}: {MANIFEST_NAME} and {INDEX_NAME} do not belong together, or one is damaged: according to the first there are "
                f"{self.manifest.class_counts[one]:,} samples of class '{self.classes[one]}', according to the second {counts[one]:,}; {self.again}"
            )

    @property
    def place(self) -> Path:
        """The folder that `open` takes to open these samples again."""
        return self.folder if self.part is None else self.part[0]

    @property
    def index_path(self) -> Path:
        return self.place / (INDEX_NAME if self.quarantine is None else self.quarantine.index)

    @property
    def again(self) -> str:
        """What to do about an index that cannot be used."""
        if self.part is not None:
            return f"delete {self.place.parent}, and run again"
        if self.quarantine is not None:
            return "run `dtl verify SHARDS --quarantine` again"
        return "index the shards again" if "keys_sha256" in self.manifest.made_by else "pack the data again"

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def dataset_id(self) -> str:
        return self.manifest.dataset_id

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def shapes(self, samples: npt.NDArray[np.int64] | slice = slice(None), *, exif: bool = True) -> tuple[Sides, Sides, npt.NDArray[np.uint8]]:
        """Widths, heights, and EXIF orientations (1 to 8) of these samples; without `exif` as the images are stored, and 1."""
        turns = ((self.flags[samples] >> _TURN_BITS & _TURN_MASK) + 1).astype(np.uint8)
        widths, heights = self.widths[samples].astype(np.int64), self.heights[samples].astype(np.int64)
        if exif:
            return widths, heights, turns
        swapped = turns >= 5
        return np.where(swapped, heights, widths), np.where(swapped, widths, heights), np.ones_like(turns)

    def read(self, samples: npt.ArrayLike) -> list[bytes | DamagedSample]:
        """The images' bytes, in the order asked for. What fails its crc32 is a DamagedSample in its slot; what cannot be read for another
        reason, such as a server that is away, an UnreachableSample.
        """
        numbers = np.asarray(samples, np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.num_samples):
            raise IndexError(f"sample numbers go from 0 to {self.num_samples - 1}, but {numbers.min()} to {numbers.max()} were requested")
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        offsets, sizes = self.offsets[numbers].astype(np.int64), self.sizes[numbers].astype(np.int64)
        crcs = self.crcs[numbers]
        found: list[bytes | _Damage] = [b""] * len(numbers)
        order = np.lexsort((offsets, shards))
        if sizes.size and sizes.max() > self.limits.max_file_bytes:
            for slot in np.flatnonzero(sizes > self.limits.max_file_bytes).tolist():
                found[slot] = _Damage(f"it has {sizes[slot]:,} bytes, more than the {self.limits.max_file_bytes:,} that are allowed (data.max_file_bytes)")
            order = order[sizes[order] <= self.limits.max_file_bytes]
        away: dict[int, _Damage] = {}  # a shard that cannot be had is asked for once a call
        with self._files.lock():
            for run in _runs(order, shards, offsets, sizes):
                shard, start = int(shards[run[0]]), int(offsets[run[0]])
                end = int(max(offsets[slot] + sizes[slot] for slot in run))
                block = away[shard] if shard in away else self._pread(shard, start, end - start)
                if isinstance(block, _Damage) and block.is_away:
                    away[shard] = block
                for slot in run:
                    found[slot] = _cut(block, int(offsets[slot]) - start, int(sizes[slot]), int(crcs[slot]))
        return [one if isinstance(one, bytes) else self._lost(int(sample), one) for sample, one in zip(numbers, found)]

    def key(self, sample: int) -> str:
        """The sample's WebDataset key, from its tar header or, for tars from other tools, from the stored names.

        Raises DamagedSample where that is not there; `damaged` does not.
        """
        found = self._key(sample)
        if isinstance(found, _Damage):
            raise self.damaged(sample, found.reason)
        return found

    def damaged(self, sample: int, reason: str) -> DamagedSample:
        """What to report about `sample`; its key is empty where that cannot be read either."""
        return self._lost(sample, _Damage(reason))

    def unreachable(self, sample: int, reason: str) -> DamagedSample:
        """What to report about `sample` where the reason is not its own."""
        return self._lost(sample, _Damage(reason, True))

    def _lost(self, sample: int, damage: _Damage) -> DamagedSample:
        kind = UnreachableSample if damage.is_away else DamagedSample
        key = "" if damage.is_away and "keys_sha256" not in self.manifest.made_by else self._key(sample)  # it stands in the tar
        url = self.manifest.shards[self.shard_of(sample)].url
        shard = shown(url) if is_remote(url) else url
        return kind(shard=shard, key=key if isinstance(key, str) else "", offset=int(self.offsets[sample]), reason=damage.reason)

    def path(self, sample: int) -> str | None:
        """The image's path in the source that was packed, or None where it was not kept."""
        table = self._table(PATHS_NAME)
        return None if table is None else table[self.original(sample)]

    def name(self, sample: int) -> str:
        """What people call the sample: its path where that was kept, else its key, or SHARD@OFFSET where that is damaged."""
        try:
            return self.path(sample) or self.key(sample)
        except DamagedSample as damage:
            return f"{damage.shard}@{damage.offset}"

    @property
    def group_column(self) -> str | None:
        """The column of groups that packing stored, None where there is none."""
        table = self._table(GROUPS_NAME)
        return None if table is None else table[len(table) - 1]

    def group(self, sample: int) -> str | None:
        """The image's group in `group_column`."""
        table = self._table(GROUPS_NAME)
        return None if table is None else table[self.original(sample)]

    def original(self, sample: int) -> int:
        """The sample's number in index.bin of the folder: another one only where samples before it are in quarantine, or of another part."""
        if self.part is not None:
            return int(self.numbers[sample])
        return original_number(sample, self.quarantined)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The samples' numbers in index.bin of the folder, [N]."""
        if self.part is None:
            return np.setdiff1d(np.arange(self.num_samples + len(self.quarantined)), self.quarantined, assume_unique=True)
        if self._numbers is None:
            self._numbers = np.load(self.place / NUMBERS_NAME, mmap_mode="r")
        return self._numbers

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self.manifest, self.quarantine, self.cache, self.limits, self.part)

    def _map_index(self) -> None:
        path, again = self.index_path, self.again
        try:
            with open_regular(path) as file:
                self._map_columns(file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; {again}") from None

    def _map_columns(self, file: BinaryIO, size: int) -> None:
        path, again = self.index_path, self.again
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:8] != _MAGIC:
            raise UserError(f"{path} is not an index written by dtl; {again}")
        _, version, num_shards, num_samples, _ = _HEADER.unpack(head)
        if version not in READ_VERSIONS:
            raise UserError(f"{path} has format version {version}, but this dtl reads version {FORMAT_VERSION} and older; {again}")
        expected = _HEADER.size + 8 * num_shards + num_samples * sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)
        if size != expected:
            raise UserError(f"{path} has {size} bytes where {expected} are expected; {again}")
        # One mapping for all columns (each costs a file number), as plain arrays: indexing a np.memmap is several times slower.
        data = np.memmap(file, np.uint8, "r").view(np.ndarray)
        at = _HEADER.size
        for name, kind, length in [("shard_sizes", "<i8", num_shards), *((name, kind, num_samples) for name, kind in _COLUMNS)]:
            size = length * np.dtype(kind).itemsize
            setattr(self, name, data[at : at + size].view(kind))
            at += size
        if num_samples != self.manifest.num_samples or [shard.samples for shard in self.manifest.shards] != self.shard_sizes.tolist():
            raise UserError(f"{path} does not belong to the {MANIFEST_NAME} beside it (the samples per shard differ); {again}")

    def _pread(self, shard: int, start: int, size: int) -> bytes | _Damage:
        """Up to `size` bytes; fewer at the end of the file."""
        try:
            number = self._files.number(shard, self._open)
            if size > _READ_BYTES:  # an index may name four gigabytes, and reading takes memory for them before it looks at the file
                size = min(size, max(0, os.fstat(number).st_size - start))
            return _pread_all(number, size, start)
        except OverflowError:
            return _Damage("the index has an impossible offset")
        except (OSError, Unfetched, UserError) as error:
            return _Damage(*self.why_unread(shard, error))

    def why_unread(self, shard: int, error: OSError | Unfetched | UserError) -> tuple[str, bool]:
        """(the reason why a shard cannot be opened or read; whether it says nothing about the shard: somebody has to come back, or let us in)."""
        if isinstance(error, Unfetched):
            return str(error), not error.changed
        if isinstance(error, UserError):  # of the cache, or what lies there is not a regular file
            return str(error), self.cache is not None and self.cache.holds(shard)
        if isinstance(error, FileNotFoundError):
            url = self.manifest.shards[shard].url
            # Beside its manifest it is lost. Elsewhere, or at the end of a link, it may be a disk that is not mounted.
            return "the shard is missing", is_remote(url) or url.startswith(("/", "../")) or (self.folder / url).is_symlink()
        return f"the shard cannot be read ({error.strerror or error})", True

    def _open(self, shard: int) -> int:
        if self.cache is not None and self.cache.holds(shard):
            return self.cache.open(shard)
        return open_descriptor(self.folder / self.manifest.shards[shard].url)

    def at(self, epoch: int, step: int) -> None:
        """Whose samples this process reads from now on, for the cache of remote shards."""
        if self.cache is not None:
            self.cache.at(epoch, step)
            with self._files.lock():
                self._files.drop_removed()

    def _key(self, sample: int) -> str | _Damage:
        if "keys_sha256" in self.manifest.made_by:
            table = self._table(KEYS_NAME)
            return _Damage(f"{KEYS_NAME} is missing or damaged") if table is None else table[self.original(sample)]
        with self._files.lock():
            header = self._pread(self.shard_of(sample), int(self.offsets[sample]) - _BLOCK, _BLOCK)
        return header if isinstance(header, _Damage) else _key_of(header)

    def _table(self, name: str) -> StringTable | None:
        """A table of names beside the index, one for each of its samples; None where it is not there or not whole: names are for reports."""
        if name not in self._tables:
            try:
                table = StringTable.read(self.folder / name)
            except (OSError, UserError):
                table = None
            rows = self.num_samples + len(self.quarantined) if self.part is None else self.part[1]
            fits = table is not None and len(table) == rows + (name == GROUPS_NAME)
            self._tables[name] = table if fits else None
        return self._tables[name]


def is_packed(folder: Path) -> bool:
    """Whether `Shards.open` takes the folder."""
    return (folder / MANIFEST_NAME).is_file() or (folder / PART_NAME).is_file()


def write_part(shards: Shards, chosen: npt.NDArray[np.bool_], place: Path, *, labels: npt.NDArray[np.int32] | None = None) -> None:
    """Write the chosen samples [N] of `shards` as a part into the folder `place`, unless it is there. `labels` [N]: in place of their own.

    A part of a part is one of the same packed folder.
    """
    whole = None if shards.part is None else Part.of_folder(shards.place)
    if (place / PART_NAME).is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    numbers, samples = shards.numbers[chosen], np.flatnonzero(chosen)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(shards.shard_sizes)])
    shard_samples = np.diff(np.searchsorted(samples, starts))
    columns = {name: getattr(shards, name)[samples] for name in ROW_COLUMNS}
    if labels is not None:
        columns["labels"] = labels[samples]
    write_whole(place / NUMBERS_NAME, lambda file: np.save(file, numbers))
    index_sha256 = write_index(place / INDEX_NAME, shard_samples, columns)
    Part(
        folder=str(shards.folder.absolute()),
        of=shards.dataset_id if whole is None else whole.of,
        rows=shards.num_samples + len(shards.quarantined) if whole is None else whole.rows,
        dataset_id=dataset_id(shards.classes, sizes=columns["sizes"], crcs=columns["crcs"], labels=columns["labels"]),
        index_sha256=index_sha256,
        shard_samples=tuple(shard_samples.tolist()),
        class_counts=tuple(np.bincount(columns["labels"].clip(0), minlength=shards.num_classes)[: shards.num_classes].tolist()),
    ).write(place)


class _Damage:
    """A reason, where bytes were expected. `is_away`: it is not about the bytes, see UnreachableSample."""

    def __init__(self, reason: str, is_away: bool = False) -> None:
        self.reason, self.is_away = reason, is_away


def _runs(order: npt.NDArray[np.int64], shards: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[list[int]]:
    """Slots in reading order, those that lie close together in one shard in one list."""
    runs: list[list[int]] = []
    end = start = 0
    for slot in order.tolist():
        offset = int(offsets[slot])  # of a damaged index it may be near 2^63: Python's numbers do not overflow
        after = offset + int(sizes[slot])
        near = runs and shards[slot] == shards[runs[-1][0]] and offset - end <= _GAP_BYTES
        if near and max(end, after) - start <= _READ_BYTES:
            runs[-1].append(slot)
            end = max(end, after)
        else:
            runs.append([slot])
            start, end = offset, after
    return runs


def _cut(block: bytes | _Damage, start: int, size: int, crc: int) -> bytes | _Damage:
    if isinstance(block, _Damage):
        return block
    data = block if start == 0 and len(block) == size else block[start : start + size]
    if len(data) < size:
        return _Damage(f"the shard ends {size - len(data)} bytes before the image does")
    if zlib.crc32(data) != crc:
        return _Damage(f"the checksum is wrong (crc32 {zlib.crc32(data):08x}, expected {crc:08x})")
    return data


def _key_of(header: bytes) -> str | _Damage:
    """The key in a ustar header: the name up to the first dot of its last part, as webdataset cuts it."""
    if len(header) < _BLOCK or header[257:262] != b"ustar":
        return _Damage("there is no tar header before the image")
    stored = header[148:156].split(b"\0")[0].strip()
    if not stored.isdigit() or int(stored, 8) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
        return _Damage("the tar header before the image is damaged")
    prefix, name = (field.split(b"\0")[0].decode("utf-8", "surrogateescape") for field in (header[345:500], header[:100]))
    folder, _, base = (f"{prefix}/{name}" if prefix else name).rpartition("/")
    return (f"{folder}/" if folder else "") + base.split(".")[0]


def _pread_all(number: int, size: int, start: int) -> bytes:
    data = os.pread(number, size, start)
    if len(data) == size or not data:
        return data
    parts = [data]  # a signal or a network file system may cut a read short of the file's end
    got = len(data)
    while got < size:
        data = os.pread(number, size - got, start + got)
        if not data:
            break
        parts.append(data)
        got += len(data)
    return b"".join(parts)


class _OpenFiles:
    """File numbers of the shards read last. A forked child opens its own: it shares neither the lock nor the numbers."""

    def __init__(self) -> None:
        self._reset()

    def lock(self) -> threading.Lock:
        if self._pid != os.getpid():
            self._reset()  # the parent's numbers stay open in it; ours are copies, closed with the process
        return self._lock

    def number(self, shard: int, opened: Callable[[int], int]) -> int:
        """Under the lock only: another thread could close the number."""
        if shard in self._numbers:
            self._numbers.move_to_end(shard)
            return self._numbers[shard]
        while len(self._numbers) >= MAX_OPEN_SHARDS:
            os.close(self._numbers.popitem(last=False)[1])
        self._numbers[shard] = opened(shard)
        return self._numbers[shard]

    def drop_removed(self) -> None:
        """Close the files that were removed from their folder: open, they would still fill the disk."""
        for shard in [shard for shard, number in self._numbers.items() if os.fstat(number).st_nlink == 0]:
            os.close(self._numbers.pop(shard))

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._numbers: OrderedDict[int, int] = OrderedDict()

    def __del__(self) -> None:
        if self._pid == os.getpid():
            for number in self._numbers.values():
                os.close(number)
