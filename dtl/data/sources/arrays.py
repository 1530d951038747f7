"""Sources whose images come as arrays: the built-in digits, and CIFAR-10 and CIFAR-100 as python batches, the way torchvision keeps them
(Krizhevsky 2009, "Learning Multiple Layers of Features").

The batches are pickles, and a pickle can run any code when it is loaded. So they are read by `dtl.pickles`, which calls nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl import pickles
from dtl.data.decoding.png import store_png
from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import Source
from dtl.data.sources.content_split import content_hash, split_by_content
from dtl.data.sources.digits import DIGITS_VAL_FRACTION, read_digits
from dtl.errors import UserError
from dtl.untrusted import read_regular

# folder -> (kind, training files, test files, file of class names, its key, key of the labels)
_LAYOUTS = {
    "cifar-10-batches-py": ("CIFAR-10", [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label_names", "labels"),
    "cifar-100-python": ("CIFAR-100", ["train"], ["test"], "meta", "fine_label_names", "fine_labels"),
}
# Of one batch; CIFAR's largest has 160 MB.
_MAX_BATCH_BYTES = 1 << 30


def open_digits() -> Source:
    """The built-in digits, in the same two splits as `--val-fraction 0.2` would give: 1,437 and 360."""
    images, labels = read_digits()
    hashes = np.array([content_hash(store_png(image)) for image in images], np.uint64)
    val = split_by_content(hashes, labels, DIGITS_VAL_FRACTION, num_classes=10)
    return _from_arrays(
        kind="built-in digits",
        images=images,
        labels=labels,
        splits=val.astype(np.uint8),
        names=[f"digits/{number:04d}" for number in range(len(labels))],
        classes=tuple(str(digit) for digit in range(10)),
        split_names=("train", "val"),
    )


def cifar_folder(path: Path) -> Path | None:
    """The folder of batches, where `path` is one or holds one."""
    inside = [path / name for name in _LAYOUTS if (path / name).is_dir() and _layout(path / name)]
    if len(inside) > 1:
        raise UserError(f"{path} holds CIFAR-10 and CIFAR-100; name one of them: {inside[0]} or {inside[1]}")
    if inside:
        return inside[0]
    return path if _layout(path) else None


def open_cifar(folder: Path) -> Source:
    """Both splits, train and test, in the order of the batches."""
    kind, train, test, meta, names_key, labels_key = _LAYOUTS[_layout(folder) or ""]
    classes = tuple(_texts(folder / meta, _load(folder / meta).get(names_key), names_key))
    images, labels, splits, names = [], [], [], []
    for split, files in enumerate((train, test)):
        for file in files:
            batch = _load(folder / file)
            pixels, batch_labels = _checked(folder / file, batch, labels_key, len(classes))
            images.append(pixels)
            labels.append(batch_labels)
            splits.append(np.full(len(batch_labels), split, np.uint8))
            stems = [f"{number:05d}.png" for number in range(len(batch_labels))]
            if batch.get("filenames"):
                stems = _texts(folder / file, batch["filenames"], "filenames", len(stems))
            names += [f"{file}/{stem}" for stem in stems]
    return _from_arrays(
        kind=kind,
        images=np.concatenate(images),
        labels=np.concatenate(labels),
        splits=np.concatenate(splits),
        names=names,
        classes=classes,
        split_names=("train", "test"),
    )


def _from_arrays(
    *,
    kind: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32],
    splits: npt.NDArray[np.uint8],
    names: Sequence[str],
    classes: tuple[str, ...],
    split_names: tuple[str, ...],
) -> Source:
    """A source whose images are uint8 arrays; `splits` index `split_names`."""
    digest = sha256("\0".join(classes if "val" in split_names else [*classes, "", *split_names]).encode())
    for part in (images, labels, splits):
        digest.update(np.ascontiguousarray(part).data)
    return Source(
        kind=kind,
        root=None,
        classes=classes,
        names=StringTable.build(names),
        labels=labels.astype(np.int32),
        splits=splits.astype(np.uint8),
        split_names=split_names,
        num_bytes=images.nbytes,
        fingerprint=digest.hexdigest(),
        images=images,
    )


def _layout(folder: Path) -> str | None:
    for name, (_, train, test, meta, _, _) in _LAYOUTS.items():
        # All but the first training batch may be missing here: that is an error to be named, not another kind of source.
        if (folder / train[0]).is_file() and (folder / meta).is_file() and test:
            return name
    return None


def _load(path: Path) -> dict[str, Any]:
    names: set[str] = set()
    try:
        found = pickles.load(io.BytesIO(read_regular(path, max_bytes=_MAX_BATCH_BYTES)), names=names)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; unpack CIFAR's archive again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickles.BadPickle as error:
        raise UserError(f"{path} is not a CIFAR batch: {error}") from None
    if unexpected := sorted(names - {"numpy.ndarray", *pickles.PLAIN}):
        raise UserError(f"{path} is not a CIFAR batch: it refers to {unexpected[0]}, which a CIFAR batch does not need")
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a CIFAR batch: it holds a {type(found).__name__}")
    return found


def _checked(path: Path, batch: dict[str, Any], labels_key: str, num_classes: int) -> tuple[Any, Any]:
    """Pixels [N, 32, 32, 3] and labels [N]. A batch holds each image as 3 planes of 32 x 32."""
    if "data" not in batch or labels_key not in batch:
        raise UserError(f"{path} is not a CIFAR batch: it has {', '.join(sorted(map(str, batch)))}, not data and {labels_key}")
    try:
        data, labels = _array(batch["data"]), _array(batch[labels_key]).astype(np.int32)
    except (pickles.BadPickle, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a CIFAR batch: {error}") from None
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise UserError(f"{path} is not a CIFAR batch: data is {data.dtype} {data.shape}, labels are {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _texts(path: Path, value: Any, key: str, count: int | None = None) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value) or count not in (None, len(value)):
        raise UserError(f"{path} is not a CIFAR file: it has no list {key}{'' if count is None else f' of {count:,} names'}")
    return list(value)


def _array(value: Any) -> Any:
    """An array, or a list of numbers as one."""
    if isinstance(value, pickles.Array):
        return value.numpy()
    if not isinstance(value, (list, tuple)) or not all(type(number) is int for number in value):
        raise pickles.BadPickle(f"expected an array or a list of numbers, found a {type(value).__name__}")
    return np.array(value, np.int64)
