"""Curves, confusion and comparison: the numbers behind the pictures, and pictures for everything that may come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_runs import PHASES, make_config, make_run, write_history

from dtl.config import config_from_dict
from dtl.errors import UserError
from dtl.report import style
from dtl.report.compare import compare, compare_figure, differences
from dtl.report.confusion import ClassNumbers, classes_figure, confused_pairs, confusion_figure, hardest_classes
from dtl.report.curves import curves_figure, epoch_marks, thinned
from dtl.report.record import PhaseRecord, RunRecord, read_run


def saved(figure: Any, path: Path) -> Image.Image:
    style.save(figure, path)
    with Image.open(path) as image:
        image.load()
        return image


# ---- curves


def test_curves_of_a_run_with_phases(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", model=False))
    with style.plain():
        image = saved(curves_figure(record), tmp_path / "curves.png")
    assert image.width > 1000
    assert epoch_marks(record) == [(0, 0), (12, 1), (24, 2), (36, 3), (48, 4), (60, 5)]


@pytest.mark.parametrize(
    "events",
    [
        [{"event": "train", "phase": "a", "epoch": 0, "step": 1, "loss": 1.0, "lr": 0.1}],
        [{"event": "val", "phase": "a", "epoch": 0, "step": 1, "loss": "nan", "top1": 0.0}],
        [{"event": "train", "phase": "a", "epoch": 0, "step": s, "loss": "nan" if s == 2 else 1e6 if s == 1 else 0.0, "lr": 0.0} for s in range(1, 90)],
        [{"event": "train", "phase": f"$p_{s}^{{", "epoch": s, "step": s + 1, "loss": -1.0, "lr": 10.0**-s} for s in range(9)],
    ],
)
def test_curves_of_odd_histories(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    folder = make_run(tmp_path / "run", model=False)
    write_history(folder, events)
    with style.plain():
        for width in (style.NARROW, style.WIDE):
            saved(curves_figure(read_run(folder), width), tmp_path / "curves.png")


def test_no_events_no_curves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model=False)
    write_history(folder, [])
    assert curves_figure(read_run(folder)) is None


def test_a_run_of_weeks_is_drawn_from_few_points(tmp_path: Path) -> None:
    steps = np.arange(1.0, 1_000_001)
    columns = {"step": steps, "epoch": (steps - 1) // 100, "loss": np.cos(steps), "lr": steps, "top1": steps / 1e6}
    record = RunRecord(tmp_path, phases=[PhaseRecord("all", "classify", 0, columns, columns)])
    assert record.steps_per_epoch == 100
    assert 3 <= len(epoch_marks(record)) <= 8
    with style.plain():
        figure = curves_figure(record)
        assert figure is not None
        assert max(len(line.get_xdata()) for axes in figure.axes for line in axes.lines) <= 600
        saved(figure, tmp_path / "curves.png")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_order_range_and_mean(values: list[float], most: int) -> None:
    y = np.asarray(values)
    x, thin = thinned(np.arange(len(y), dtype=np.float64), y, most)
    assert len(x) == len(thin) == min(len(y), most)
    assert (np.diff(x) > 0).all()
    assert thin.min() >= y.min() - 1e-6
    assert thin.max() <= y.max() + 1e-6


# ---- classes


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


# ---- comparison


def runs_to_compare(folder: Path) -> list[RunRecord]:
    short = {"all": {"train": "all", "epochs": 4, "lr": 0.02}}
    for seed in (0, 1, 2):
        make_run(folder / f"rotnet-s{seed}", make_config(f"rotnet-s{seed}", seed=seed), model=False)
    make_run(folder / "supervised", make_config("supervised", phases=short), model=False)
    return [read_run(path) for path in sorted(folder.iterdir())]


def test_seeds_become_one_curve_and_the_pretext_is_left_out(tmp_path: Path) -> None:
    comparison = compare(runs_to_compare(tmp_path))
    assert [(group.name, len(group.courses)) for group in comparison.groups] == [("rotnet", 3), ("supervised", 1)]
    assert (comparison.unit, comparison.task) == ("epoch", "classify")
    assert comparison.groups[0].courses[0].x.tolist() == [1, 2, 3, 4]
    assert comparison.groups[1].courses[0].x.tolist() == [1, 2, 3, 4]
    assert "rotnet-s0: pretext" in comparison.left_out[0]
    with style.plain():
        saved(compare_figure(comparison), tmp_path / "compare.png")


def test_seeds_with_images_and_sources_of_their_own_become_one_curve_too(tmp_path: Path) -> None:
    """`few0.csv` and `runs/pre-s0` belong to seed 0; a number that is not the seed tells runs apart."""
    short = {"all": {"train": "all", "epochs": 4, "lr": 0.02}}
    records = []
    for kind in ("pretext", "scratch"):
        for seed in (0, 1, 18):
            config = make_config(f"{kind}-s{seed}", phases=short, seed=seed, train=f"resnet18/few{seed}.csv").to_dict()
            config["transfer"] = {"source": f"runs/pre-s{seed}"} if kind == "pretext" else None
            records.append(read_run(make_run(tmp_path / f"{kind}-s{seed}", config_from_dict(config, "test"), model=False)))
    config = make_config("other-s1", phases=short, seed=1, train="resnet18/few5.csv")
    records.append(read_run(make_run(tmp_path / "other-s1", config, model=False)))
    groups = compare(records).groups
    assert [(group.name, len(group.courses)) for group in groups] == [
        ("pretext", 3),
        ("scratch", 3),
        ("other-s1", 1),
    ]
    assert differences(groups) == [
        ("data.train", ["resnet18/few{seed}.csv", "resnet18/few{seed}.csv", "resnet18/few5.csv"]),
        ("transfer.source", ["runs/pre-s{seed}", "–", "–"]),
    ]


@pytest.mark.parametrize(("schedule", "sloping"), [("step", False), ("cosine", True)])
def test_a_rate_that_falls_in_stairs_is_drawn_so(tmp_path: Path, schedule: str, sloping: bool) -> None:
    phases = {"all": {"train": "all", "epochs": 6, "lr": 0.1, "schedule": schedule}}
    record = read_run(make_run(tmp_path / "run", make_config("run", phases=phases), model=False))
    with style.plain():
        figure = curves_figure(record)
    assert figure is not None
    (line,) = [line for line in figure.axes[2].lines if len(line.get_xdata()) > 2]
    assert (line.get_drawstyle() == "default") == sloping
    x, y = line.get_xdata(), line.get_ydata()
    assert (x[0] == 0) != sloping
    assert y[-1] == record.phases[0].train["lr"][-1]


def test_what_differs_between_runs_is_listed_once(tmp_path: Path) -> None:
    assert dict(differences(compare(runs_to_compare(tmp_path)).groups)) == {
        "phases.pretext": ["yes", "–"],
        "phases.head": ["yes", "–"],
        "phases.all.epochs": ["3", "4"],
        "phases.all.lr": ["0.01", "0.02"],
    }


def test_runs_without_evaluations_cannot_be_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", model=False)
    write_history(folder, [])
    with pytest.raises(UserError, match="nothing to compare"):
        compare([read_run(folder)])


def test_many_runs_are_told_apart_or_refused(tmp_path: Path) -> None:
    records = []
    for place in range(18):
        phases = {"all": {**PHASES["all"], "lr": 0.1 + place}}
        records.append(read_run(make_run(tmp_path / f"run-{place}", make_config(f"run-{place}", phases=phases), model=False)))
    with style.plain():
        figure = compare_figure(compare(records))
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
        assert len(looks) == 18
        saved(figure, tmp_path / "compare.png")
    with pytest.raises(UserError, match="more than one plot can show"):
        compare(records * 4)
