"""Intervals and McNemar's test against published values, scipy's tests, and their own promise: 95 of 100 intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dtl import intervals
from dtl.intervals import Bootstrap, Paired, accuracy_interval, mcnemar, shown, wilson
from dtl.training.metrics import macro_intervals

# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (Wilson's score): r of n.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("right", "n", "low", "high"), NEWCOMBE)
def test_wilson_has_the_published_values(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right / n, n)
    assert found is not None
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson(1 - right / n, n)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_wilson_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 2, 7, 153, 10_000):
        for right in {0, 1, n // 3, n - 1, n}:
            theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
            assert wilson(right / n, n) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))


def test_what_has_no_interval() -> None:
    assert wilson(None, 10) is None
    assert wilson(math.nan, 10) is None
    assert wilson(0.5, 0) is None
    assert shown(None) == ""
    assert shown(wilson(147 / 153, 153)) == "91.7 to 98.2"


def test_mcnemar_equals_scipys_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for better in (0, 1, 2, 4, 9, 30, 400):
        for worse in (0, 1, 3, 4, 9, 31, 380):
            theirs = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
            assert mcnemar(better, worse) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_in_words() -> None:
    assert str(Paired(9, 4)) == "better on 9, worse on 4: p = 0.27, not told apart"  # 2 (1 + 13 + 78 + 286 + 715) / 2^13
    assert str(Paired(1, 12)) == "better on 1, worse on 12: p = 0.0034, told apart"
    assert str(Paired(0, 0)) == "better on 0, worse on 0: p = 1.00, not told apart"
    assert str(Paired(900, 100)) == "better on 900, worse on 100: p < 0.0001, told apart"


def test_a_bootstrap_of_an_accuracy_is_wilsons_interval() -> None:
    right = np.arange(200) % 10 > 0
    bootstrap = Bootstrap(200)
    variance = bootstrap.variance(lambda counts: (counts @ right) / 200)
    found, plain = bootstrap.interval(0.9, variance), wilson(0.9, 200)
    assert found == (pytest.approx(plain[0], abs=0.005), pytest.approx(plain[1], abs=0.005))  # type: ignore[index]
    assert Bootstrap(200).variance(lambda counts: (counts @ right) / 200) == variance, "the same draws each time"
    assert Bootstrap(200, seed=1).variance(lambda counts: (counts @ right) / 200) != variance


def test_images_of_a_group_are_drawn_together() -> None:
    """Twenty frames of each of ten patients, all right or all wrong, are ten images' worth."""
    groups = np.repeat(np.arange(10), 20)
    right = groups > 1
    found, few, many = accuracy_interval(right, Bootstrap(200, groups)), wilson(0.8, 10), wilson(0.8, 200)
    assert found is not None
    assert few is not None
    assert many is not None
    assert found == (pytest.approx(few[0], abs=0.02), pytest.approx(few[1], abs=0.02))
    assert found[0] < many[0] - 0.1
    assert accuracy_interval(right, Bootstrap(200)) == many
    all_right = accuracy_interval(groups >= 0, Bootstrap(200, groups))
    assert all_right == wilson(1.0, 10), "nothing differs between draws: ten groups"


def coverage(n: int, share: float, num_classes: int, sets: int) -> tuple[float, float]:
    """How often the intervals of balanced accuracy and macro F1 hold the truth, over so many drawn sets of n images."""
    random = np.random.Generator(np.random.PCG64(n * 1000 + round(100 * share)))
    held = np.zeros(2)
    for number in range(sets):
        labels = random.integers(0, num_classes, n)
        shift = random.integers(1, num_classes, n)
        predicted = np.where(random.random(n) < share, labels, (labels + shift) % num_classes)
        for place, found in enumerate(macro_intervals(labels, predicted, num_classes, Bootstrap(n, seed=number))):
            held[place] += found is not None and found[0] <= share <= found[1]
    return tuple(held / sets)  # type: ignore[return-value]


def check_coverage(grid: list[tuple[int, float, int]], sets: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 200)
    found = {cell: coverage(*cell, sets) for cell in grid}
    values = np.asarray(list(found.values()))
    worst = min(found, key=lambda cell: min(found[cell]))
    print(f"coverage over {len(grid)} cells: mean {values.mean():.2%}, minimum {values.min():.2%} at n, p, classes = {worst}")
    assert 0.94 <= values.mean() <= 0.965
    assert values.min() >= least


def test_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick part of the grid, with a hundred sets a cell."""
    check_coverage([(50, 0.8, 2), (50, 0.95, 2), (100, 0.9, 5)], 100, 0.88, monkeypatch)


@pytest.mark.soak
def test_coverage_over_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [(n, share, classes) for n in (20, 50, 150, 500) for share in (0.6, 0.8, 0.9, 0.95, 0.98) for classes in (2, 5)]
    check_coverage(grid, 1000, 0.90, monkeypatch)
