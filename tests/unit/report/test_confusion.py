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
from dtl.report.confusion import ClassNumbers, by_group, by_size, classes_figure, confused_pairs, confusion_figure, hardest_classes


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


def test_accuracy_by_size_and_by_group() -> None:
    sides = np.array([10, 10, 20, 30, 40, 50, 60, 70])
    right = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    found = by_size(sides, right)
    assert sum(one.total for one in found) == 8
    assert sum(one.right for one in found) == 5
    assert (found[0].name, found[0].right, found[0].total) == ("10 pixels", 1, 2)
    assert found[-1].name.endswith("to 70 pixels")
    assert by_size(np.full(8, 32), right) == []
    assert by_size(np.zeros(0, np.int64), np.zeros(0, bool)) == []
    codes = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    worst = by_group(["a", "b", "c", "d"], codes, right, 2)
    assert [(one.name, one.right, one.total) for one in worst] == [("b", 2, 3), ("a", 1, 2)]
    assert by_group(["a", "b"], np.array([0, 1]), np.array([True, False]), 5) == []
