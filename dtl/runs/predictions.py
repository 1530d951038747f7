"""predictions.npy: what a run's network predicted for each validation image, in the evaluation that its model folder's metrics are of.

A NumPy file of one row per image, 24 bytes each, which `np.load` and `pandas.DataFrame(np.load(...))` read. The report counts its confusion
matrix, its mistakes and the rates of classes from it, so that they are the headline's own. model.json holds its SHA-256. No torch in here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, read_regular, write_whole
from dtl.intervals import Paired
from dtl.untrusted import Count, Record, Sha256, Text

NAME = "predictions.npy"
TWINS_NAME = "twins.jsonl"
"""Beside it: the validation and test images that have a twin in train."""
_ROW = np.dtype([("sample", "<i8"), ("label", "<i4"), ("predicted", "<i4"), ("probability", "<f4"), ("loss", "<f4")])


@dataclass(frozen=True)
class ImagePredictions:
    """One row per image as the task made it (four of a rotated one), in the order of sample numbers; damaged images have none. All [n]."""

    samples: npt.NDArray[np.int64]
    """Numbers in the validation shards."""
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    """Of the predicted class; NaN where a logit was not finite."""
    loss: npt.NDArray[np.float32]
    """Plain cross-entropy."""

    @classmethod
    def joined(cls, integers: npt.NDArray[np.int64], floats: npt.NDArray[np.float32]) -> ImagePredictions:
        """From rows [n, 3] of sample, label, predicted and rows [n, 2] of probability, loss, in any order."""
        order = np.lexsort((integers[:, 1], integers[:, 0]))
        samples, labels, predicted = integers[order].T
        probability, loss = floats[order].T
        return cls(samples, labels, predicted, probability, loss)

    def __len__(self) -> int:
        return len(self.samples)

    def against(self, other: ImagePredictions) -> Paired:
        """Which of two networks is better on the same images. UserError where the rows are not of the same, independent images."""
        if not (np.array_equal(self.samples, other.samples) and np.array_equal(self.labels, other.labels)):
            raise UserError("other images of their validation data were damaged")
        if len(np.unique(self.samples)) < len(self):
            raise UserError("several rotations of one image are not independent")
        return Paired(int((other.wrong & ~self.wrong).sum()), int((self.wrong & ~other.wrong).sum()))

    @property
    def wrong(self) -> npt.NDArray[np.bool_]:
        return np.not_equal(self.labels, self.predicted)


class PredictionsFile(Record):
    """What model.json records of the file."""

    bytes: Count
    sha256: Sha256
    data: Text
    """The dataset id of the validation shards, whose samples it numbers."""


def write_predictions(run: Path, predictions: ImagePredictions, *, data: str) -> dict[str, Any]:
    """Write predictions.npy of a run folder, about the validation shards of dataset id `data`; returns the values of its `PredictionsFile`."""
    rows = np.empty(len(predictions), _ROW)
    for name, column in zip(_ROW.names or (), vars(predictions).values(), strict=True):
        rows[name] = column
    file = io.BytesIO()
    np.save(file, rows)
    content = file.getbuffer()
    write_whole(run / NAME, lambda out: out.write(content))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "data": data}


def recorded_file(made_by: Mapping[str, Any], origin: str) -> PredictionsFile | None:
    """What the `made_by` of the model.json at `origin` says; None where an older dtl wrote it."""
    values = made_by.get("predictions")
    return None if values is None else PredictionsFile.from_values(values, f"{origin}: made_by.predictions")


def read_predictions(run: Path, facts: PredictionsFile, num_classes: int) -> ImagePredictions | None:
    """The predictions of the weights whose model.json has `facts`; None where the file is gone. UserError for one that is damaged or of other weights."""
    path = run / NAME
    try:
        data = read_regular(path, max_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != facts.bytes or hashlib.sha256(data).hexdigest() != facts.sha256:
        raise UserError(f"{path} is not the file that model.json is about (another SHA-256): it was damaged or exchanged")
    rows = _rows(data, path)
    samples, labels, predicted = (rows[name].astype(np.int64) for name in ("sample", "label", "predicted"))
    found = ImagePredictions(samples, labels, predicted, rows["probability"].copy(), rows["loss"].copy())
    if any(len(column) and not 0 <= int(column.min()) <= int(column.max()) < num_classes for column in (found.labels, found.predicted)):
        raise UserError(f"{path}: it names classes that the model does not have")
    return found


def _rows(data: bytes, path: Path) -> npt.NDArray[Any]:
    """Read without `np.load`, which makes the array that a header asks for before it knows whether there is so much."""
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if kind != _ROW or shape != ((len(data) - file.tell()) // _ROW.itemsize,) or (len(data) - file.tell()) % _ROW.itemsize:
            raise ValueError("other columns, or another length")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: no predictions that dtl wrote: {' '.join(str(error).split())[:200]}") from None
    return np.frombuffer(data, _ROW, offset=file.tell())
