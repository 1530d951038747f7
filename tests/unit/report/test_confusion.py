"""Numbers and pictures per class, for any number of classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dtl.report import style
from dtl.report.confusion import ClassNumbers, classes_figure, confused_pairs, confusion_figure, hardest_classes


def saved(figure: Any, path: Path) -> Image.Image:
    style.save(figure, path)
    with Image.open(path) as image:
        image.load()
        return image


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=80))
@settings(max_examples=60, deadline=None)
def test_class_numbers_and_pairs_equal_a_full_matrix(k: int, rows: list[tuple[int, int]]) -> None:
    labels, predicted = (np.asarray([row[i] % k for row in rows], np.int64) for i in (0, 1))
    matrix = np.zeros((k, k), np.int64)
    for label, guess in zip(labels, predicted):
        matrix[label, guess] += 1
    numbers = ClassNumbers.count(labels, predicted, k)
    for c in range(k):
        seen, taken = matrix[c].sum(), matrix[:, c].sum()
        assert math.isnan(numbers.recall[c]) if not seen else numbers.recall[c] == matrix[c, c] / seen
        assert math.isnan(numbers.precision[c]) if not taken else numbers.precision[c] == matrix[c, c] / taken
    hardest = hardest_classes(numbers)
    assert sorted(hardest.tolist()) == np.flatnonzero(matrix.sum(axis=1)).tolist()
    assert (np.diff(numbers.recall[hardest]) >= 0).all()
    pairs = confused_pairs(labels, predicted, k)
    assert all(matrix[true, taken] == count and true != taken for true, taken, count in pairs)
    wrong = np.sort(matrix[~np.eye(k, dtype=bool)])[::-1]
    assert [count for *_, count in pairs] == wrong[wrong > 0][:12].tolist()


@pytest.mark.parametrize("k", [1, 2, 21, 102, 1003])
def test_pictures_for_any_number_of_classes(tmp_path: Path, k: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(1, k - 1), 500)  # the last class has no sample
    predicted = np.where(rng.random(500) < 0.7, labels, rng.integers(0, k, 500))
    names = [f"$class_{i}^{{ with <a> rather long 名前" for i in range(k)]
    with style.plain():
        saved(confusion_figure(labels, predicted, names), tmp_path / "confusion.png")
        figure = classes_figure(ClassNumbers.count(labels, predicted, k), names)
        assert figure is not None
        assert saved(figure, tmp_path / "classes.png").height < 1600
    assert classes_figure(ClassNumbers.count(labels[:0], labels[:0], k), names) is None
