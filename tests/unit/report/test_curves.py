"""Curves, confusion and comparison: the numbers behind the pictures, and pictures for everything that may come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_runs import make_config, make_events, make_run, write_history

from dtl.optim.schedule import Schedule, lr_at
from dtl.report import record as module
from dtl.report import style
from dtl.report.curves import curves_figure, epoch_marks, learning_rates, thinned
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


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_the_rate_is_drawn_at_each_step_as_the_run_computed_it(tmp_path: Path, schedule: str, log_every: int) -> None:
    warmup = 0 if schedule == "one_cycle" else 0.4
    phases = {
        "head": {"train": "head", "steps": 9, "lr": 0.3},
        "all": {"train": "all", "epochs": 4.5, "lr": 0.1, "schedule": schedule, "step_epochs": 1.2, "warmup": warmup},
    }
    config = make_config("run", phases=phases)
    folder = make_run(tmp_path / "run", config, model=False)
    truth = [lr_at(step, schedule=Schedule("cosine"), num_steps=9, base_lr=0.3) for step in range(9)]
    planned = Schedule(schedule, warmup_steps=round(warmup * 12), every_steps=14 if schedule == "step" else 0)
    truth += [lr_at(step, schedule=planned, num_steps=54, base_lr=0.1) for step in range(54)]
    events = make_events(config, log_every=log_every)
    write_history(folder, [{**event, **({"lr": truth[event["step"] - 1]} if event["event"] == "train" else {})} for event in events])
    record = read_run(folder)
    for phase, first in zip(record.phases, (0, 9), strict=True):
        steps, values, in_stairs = learning_rates(record, phase)
        assert in_stairs
        assert steps.tolist() == list(range(first, first + phase.num_steps + 1))
        np.testing.assert_allclose(values[1:], truth[first : first + phase.num_steps], rtol=1e-12)
    # A rate that was changed by hand: what was logged is drawn.
    write_history(folder, [{**event, **({"lr": 0.5} if event["event"] == "train" else {})} for event in make_events(config, log_every=log_every)])
    for phase in read_run(folder).phases:
        assert set(learning_rates(record, phase)[1].tolist()) == {0.5}


# ---- comparison


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


def test_a_thousand_phases_are_few_artists_and_one_count_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def phase(number: int) -> PhaseRecord:
        row = {"step": 1.0 + number, "epoch": float(number), "loss": 1 / (1 + number), "lr": 0.1, "top1": number / 1000, "num_samples": 10.0}
        columns = {name: np.array([value]) for name, value in row.items()}
        return PhaseRecord(f"p{number}", "classify", number, columns, columns)

    record = RunRecord(tmp_path, phases=[phase(number) for number in range(1000)])
    counted: list[RunRecord] = []
    count = module._steps_per_epoch
    monkeypatch.setattr(module, "_steps_per_epoch", lambda record: counted.append(record) or count(record))
    with style.plain():
        figure = curves_figure(record)
    assert figure is not None
    assert len(counted) == 1
    assert sum(len(axes.get_children()) for axes in figure.axes) < 100
    assert [line.get_ydata().size for line in figure.axes[0].lines[:2]] == [1999, 1999], "each phase's point, and a gap between two"
