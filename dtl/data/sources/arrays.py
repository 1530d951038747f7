"""Sources whose images come as arrays: the built-in digits, and CIFAR-10 and CIFAR-100 as python batches, the way torchvision keeps them
(Krizhevsky 2009, "Learning Multiple Layers of Features").

The batches are pickles, and a pickle can run any code when it is loaded. So ours are read by an unpickler that knows NumPy arrays and
nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import Source
from dtl.data.sources.content_split import content_hash, split_by_content
from dtl.data.sources.digits import DIGITS_VAL_FRACTION, read_digits
from dtl.data.sources.png import store_png
from dtl.errors import UserError

# folder -> (kind, training files, test files, file of class names, its key, key of the labels)
_LAYOUTS = {
    "cifar-10-batches-py": ("CIFAR-10", [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label_names", "labels"),
    "cifar-100-python": ("CIFAR-100", ["train"], ["test"], "meta", "fine_label_names", "fine_labels"),
}
# What a pickled NumPy array consists of, under NumPy's old and new module names.
_ALLOWED = {
    (module, name)
    for module, name in [
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    ]
}


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
    """Both splits, train and val (CIFAR's test set), in the order of the batches."""
    kind, train, test, meta, names_key, labels_key = _LAYOUTS[_layout(folder) or ""]
    classes = tuple(str(name) for name in _load(folder / meta)[names_key])
    images, labels, splits, names = [], [], [], []
    for split, files in enumerate((train, test)):
        for file in files:
            batch = _load(folder / file)
            pixels, batch_labels = _checked(folder / file, batch, labels_key, len(classes))
            images.append(pixels)
            labels.append(batch_labels)
            splits.append(np.full(len(batch_labels), split, np.uint8))
            stems = batch.get("filenames") or [f"{number:05d}.png" for number in range(len(batch_labels))]
            names += [f"{file}/{stem}" for stem in stems]
    return _from_arrays(
        kind=kind,
        images=np.concatenate(images),
        labels=np.concatenate(labels),
        splits=np.concatenate(splits),
        names=names,
        classes=classes,
    )


def _from_arrays(
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


def _layout(folder: Path) -> str | None:
    for name, (_, train, test, meta, _, _) in _LAYOUTS.items():
        # All but the first training batch may be missing here: that is an error to be named, not another kind of source.
        if (folder / train[0]).is_file() and (folder / meta).is_file() and test:
            return name
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; unpack CIFAR's archive again") from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(f"{path} is no CIFAR batch: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no CIFAR batch: it holds a {type(found).__name__}")
    return found


def _checked(path: Path, batch: dict[str, Any], labels_key: str, num_classes: int) -> tuple[Any, Any]:
    """Pixels [N, 32, 32, 3] and labels [N]. A batch holds each image as 3 planes of 32 x 32."""
    if "data" not in batch or labels_key not in batch:
        raise UserError(f"{path} is no CIFAR batch: it has {', '.join(sorted(map(str, batch)))}, not data and {labels_key}")
    data, labels = np.asarray(batch["data"]), np.asarray(batch[labels_key], np.int32)
    if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise UserError(f"{path} is no CIFAR batch: data is {data.dtype} {data.shape}, labels are {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)
