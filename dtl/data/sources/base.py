"""What can be packed, listed in one shape: `Source`. Here images are only listed, none is read: that is the work of packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable

# The files that are taken for images, by their names; what they are is decided by their content.
_ALWAYS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"))
# Modules that read them, the first that is installed.
_WITH = {".avif": ("PIL._avif", "pillow_avif"), ".heic": ("pillow_heif",), ".heif": ("pillow_heif",), ".hif": ("pillow_heif",), ".jxl": ("pillow_jxl",)}
IMAGE_EXTENSIONS = _ALWAYS | {extension for extension, modules in _WITH.items() if any(find_spec(module) for module in modules)}
UNLABELLED = "unlabelled"  # the one class of images that have no labels
ALL = "all"  # the one split of a source that has no splits of its own


# One image in a larger file: where its bytes are (in a zip: its local header), how many there are and how many they become, zlib's crc32 of these, and
# how they lie there (WHOLE ...).
MEMBER = np.dtype([("offset", "<u8"), ("stored", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("how", "u1")])
WHOLE, ZIP_STORED, ZIP_DEFLATED = 0, 1, 2


@dataclass(frozen=True)
class Bundle:
    """Where the images of a source are that are no files of their own.

    Either `members` [N] are their places in the file `Source.root`; or `write` copies all of them into one file, for sources whose own form
    cannot be read in any order, and returns their places in it. UserError where an image is larger than the bytes allowed.
    """

    members: npt.NDArray[np.void] | None = None
    write: Callable[[BinaryIO, int], npt.NDArray[np.void]] | None = None


@dataclass(frozen=True)
class Source:
    """Samples as columns: about 60 bytes each, no object for each.

    `names[i]` is the path of sample i under `root` (or, for arrays, a made-up name), `labels` int32 [N] index `classes`, `splits`
    uint8 [N] index `split_names`. The files are the images, or `images` uint8 [N, H, W] or [N, H, W, 3] are, or they lie in a `bundle`.
    `fingerprint` changes when a file is added, removed, renamed, relabelled, or has another size or modification time.
    """

    kind: str
    root: Path | None
    classes: tuple[str, ...]
    names: StringTable
    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.uint8]
    split_names: tuple[str, ...]
    num_bytes: int
    fingerprint: str
    images: npt.NDArray[np.uint8] | None = None
    bundle: Bundle | None = None
    display_names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def has_splits(self) -> bool:
        """Whether it says what to validate on. One that calls all of its samples training samples leaves that open."""
        return self.split_names not in ((ALL,), ("train",))

    def counts(self) -> npt.NDArray[np.int64]:
        """Samples per split and class, [splits, K]."""
        flat = self.splits.astype(np.int64) * len(self.classes) + self.labels
        return np.bincount(flat, minlength=len(self.split_names) * len(self.classes)).reshape(len(self.split_names), -1)


class SourceBuilder:
    """Collects samples into columns. Names must come in a fixed order: it decides the packed order."""

    def __init__(self) -> None:
        self._tables: list[StringTable] = []
        self._labels: list[npt.NDArray[np.int32]] = []
        self._splits: list[npt.NDArray[np.uint8]] = []
        self._digest = sha256()
        self.num_bytes = 0

    def add(self, names: Sequence[str], *, label: int, split: int, sizes: Sequence[int], mtimes: Sequence[int]) -> None:
        """Samples of one class and split; `mtimes` in nanoseconds."""
        self.add_table(StringTable.build(names), labels=np.full(len(names), label, np.int32), split=split, sizes=sizes, mtimes=mtimes)

    def add_table(
        self, names: StringTable, *, labels: npt.NDArray[np.int32], split: int | npt.NDArray[np.uint8], sizes: Sequence[int], mtimes: Sequence[int]
    ) -> None:
        """Samples of many classes, and of one split or of one each."""
        self._tables.append(names)
        self._labels.append(labels)
        self._splits.append(np.full(len(names), split, np.uint8))
        self.num_bytes += sum(sizes)
        for part in (names.offsets, names.data, labels, self._splits[-1], np.array(sizes, np.int64), np.array(mtimes, np.int64)):
            self._digest.update(np.ascontiguousarray(part).data)

    def build(
        self,
        *,
        kind: str,
        root: Path,
        classes: tuple[str, ...],
        split_names: tuple[str, ...],
        display_names: dict[str, str],
        notes: Sequence[str],
    ) -> Source:
        self._digest.update("\0".join([*classes, "", *split_names, "", *display_names.values()]).encode("utf-8", "surrogateescape"))
        return Source(
            kind=kind,
            root=root,
            classes=classes,
            names=StringTable.join(self._tables),
            labels=np.concatenate([np.zeros(0, np.int32), *self._labels]),
            splits=np.concatenate([np.zeros(0, np.uint8), *self._splits]),
            split_names=split_names,
            num_bytes=self.num_bytes,
            fingerprint=self._digest.hexdigest(),
            display_names=display_names,
            notes=tuple(notes),
        )
