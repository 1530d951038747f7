"""What can be packed, each read into one shape: `Source`. `open_source` recognises which it is.

An image folder (a folder a class), a root with train/ and val/ of such folders, a text or CSV list, CIFAR's python batches, `digits`.
Here images are only listed, none is read: that is pack's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable
from dtl.data.sources.content_split import split_by_content
from dtl.data.sources.digits import DIGITS_VAL_FRACTION, read_digits
from dtl.data.sources.png import store_png
from dtl.errors import UserError
from dtl.text import near_path

# Names of the folders of a split, best first: val is set aside for choosing, test is meant for the end.
VAL_NAMES = ("val", "valid", "validation", "test")
_ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")
UNLABELLED = "unlabelled"  # the one class of images that have no labels
ALL = "all"  # the one split of a source that has no splits of its own


@dataclass(frozen=True)
class Source:
    """Samples as columns: about 60 bytes each, no object for each.

    `names[i]` is the path of sample i under `root` (or, for arrays, a made-up name), `labels` int32 [N] index `classes`, `splits`
    uint8 [N] index `split_names`. Either the files are the images, or `images` uint8 [N, H, W] or [N, H, W, 3] are.
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
    display_names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def has_splits(self) -> bool:
        return self.split_names != (ALL,)

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

    def add_table(self, names: StringTable, *, labels: npt.NDArray[np.int32], split: int, sizes: Sequence[int], mtimes: Sequence[int]) -> None:
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


def open_source(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    names: str | Path | None = None,
    on_error: str = "fail",
    labelled: bool = True,
) -> Source:
    """Recognise and list a source. UserError where there is nothing to train on.

    `classes` fixes class names and their order (a validation set takes those of its training set): others are refused, and a class
    without an image is no error then. `names` is a JSON file {class: display name}. With `on_error="skip"` a class folder without
    an image is left out, otherwise refused. With `labelled=False` a folder or list without labels is one class, `UNLABELLED`.
    """
    # Imported here: each of them builds on this module.
    from dtl.data.sources.cifar import cifar_folder, open_cifar
    from dtl.data.sources.folder import open_folder
    from dtl.data.sources.list import open_list

    if str(source) == "digits" and not Path(source).exists():
        found = open_digits()
    else:
        path = Path(source).expanduser()
        _check_exists(path)
        if path.is_file() and path.suffix.lower() in _ARCHIVES:
            raise UserError(f"{path} is an archive; unpack it and give the folder")
        if path.is_file():
            found = open_list(path, classes=classes, names=names, labelled=labelled)
        elif (batches := cifar_folder(path)) is not None:
            found = open_cifar(batches)
        else:
            found = open_folder(path, classes=classes, names=names, on_error=on_error, labelled=labelled)
    if classes is not None and found.classes != tuple(classes):
        raise UserError(f"{source} has other classes ({len(found.classes)}: '{found.classes[0]}' ...) than training ({len(classes)}: '{classes[0]}' ...)")
    return found


def open_digits() -> Source:
    """The built-in digits, in the same two splits as `--val-fraction 0.2` would give: 1,437 and 360."""
    images, labels = read_digits()
    hashes = np.array([content_hash(store_png(image)) for image in images], np.uint64)
    val = split_by_content(hashes, labels, DIGITS_VAL_FRACTION, num_classes=10)
    return from_arrays(
        kind="built-in digits",
        images=images,
        labels=labels,
        splits=val.astype(np.uint8),
        names=[f"digits/{number:04d}" for number in range(len(labels))],
        classes=tuple(str(digit) for digit in range(10)),
    )


def from_arrays(
    *,
    kind: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32],
    splits: npt.NDArray[np.uint8],
    names: Sequence[str],
    classes: tuple[str, ...],
) -> Source:
    """A source whose images are uint8 arrays; `splits` is 0 for train, 1 for val."""
    digest = sha256("\0".join(classes).encode())
    for part in (images, labels, splits):
        digest.update(np.ascontiguousarray(part).data)
    return Source(
        kind=kind,
        root=None,
        classes=classes,
        names=StringTable.build(names),
        labels=labels.astype(np.int32),
        splits=splits.astype(np.uint8),
        split_names=("train", "val"),
        num_bytes=images.nbytes,
        fingerprint=digest.hexdigest(),
        images=images,
    )


def content_hash(data: bytes) -> int:
    """The first 64 bits of the sha256."""
    return int.from_bytes(sha256(data).digest()[:8], "big")


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    if path.is_symlink():
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    hint = near_path(path, others=["digits"])
    if not path.parent.is_dir():
        raise UserError(f"{path} does not exist (nor does the folder {path.parent}){hint}")
    raise UserError(f"{path} does not exist{hint or '; give a folder of images, a list file, or the word digits'}")
