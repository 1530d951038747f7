"""predictions.npy: a plain NumPy file; a stranger's is refused where it is not of the weights beside it, or no table of predictions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from dtl.errors import UserError
from dtl.runs.predictions import NAME, ImagePredictions, PredictionsFile, read_predictions, recorded_file, write_predictions


def predictions() -> ImagePredictions:
    numbers = np.array([[7, 1, 2], [3, 0, 0], [7, 0, 0]], np.int64)
    return ImagePredictions.joined(numbers, np.array([[0.5, 1.5], [0.9, 0.1], [0.25, np.nan]], np.float32))


def facts_of(path: Path) -> PredictionsFile:
    data = path.read_bytes()
    return PredictionsFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), data="d")


def test_rows_come_back_in_the_order_of_samples_and_numpy_reads_them(tmp_path: Path) -> None:
    recorded = recorded_file({"predictions": write_predictions(tmp_path, predictions(), data="d")}, "model.json")
    assert recorded is not None
    found = read_predictions(tmp_path, recorded, num_classes=3)
    assert found is not None
    assert (found.samples.tolist(), found.labels.tolist(), found.predicted.tolist()) == ([3, 7, 7], [0, 0, 1], [0, 0, 2])
    assert found.wrong.tolist() == [False, False, True]
    np.testing.assert_array_equal(found.loss, np.float32([0.1, np.nan, 1.5]))
    rows = np.load(tmp_path / NAME)
    assert rows.dtype.names == ("sample", "label", "predicted", "probability", "loss")
    assert rows["probability"].tolist() == found.probability.tolist()
    assert recorded_file({}, "model.json") is None


def test_other_weights_classes_and_files_are_refused_in_one_line(tmp_path: Path) -> None:
    facts = PredictionsFile(**write_predictions(tmp_path, predictions(), data="d"))
    path = tmp_path / NAME
    with pytest.raises(UserError, match="classes that the model does not have"):
        read_predictions(tmp_path, facts, num_classes=2)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole.replace(b"label", b"lebal"), b"PK\x03\x04" + whole, whole[:40], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="another SHA-256") as caught:
            read_predictions(tmp_path, facts, num_classes=3)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="no predictions that dtl wrote"):
            read_predictions(tmp_path, facts_of(path), num_classes=3)
    header = whole[:10] + whole[10:].replace(b"(3,)", b"(9999999999999,)", 1)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for text in (header, (tmp_path / "objects.npy").read_bytes()):
        path.write_bytes(text)
        with pytest.raises(UserError, match="no predictions that dtl wrote"):
            read_predictions(tmp_path, facts_of(path), num_classes=3)
    path.unlink()
    assert read_predictions(tmp_path, facts, num_classes=3) is None
    path.mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        read_predictions(tmp_path, facts, num_classes=3)
    with pytest.raises(UserError, match="sha256"):
        recorded_file({"predictions": {"bytes": 1, "sha256": "x", "data": "d"}}, "model.json")
