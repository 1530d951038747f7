"""early_stop.patience, early_stop.threshold and keep, from the config to what an evaluation means for its phase."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtl.checkpoint.resume.state import TrainState
from dtl.config import PhaseConfig
from dtl.distributed.runtime import Runtime
from dtl.training.active import ActivePhase
from dtl.training.keep import Evaluated
from dtl.training.loop import Trainer
from dtl.training.phases import Phase, judge, plan_phases

VALUES = [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]
EVALUATIONS = st.lists(st.tuples(st.sampled_from(VALUES), st.sampled_from(VALUES)), min_size=1, max_size=12)  # (top1, loss), with many equals
MONITORS = st.sampled_from(["top1", "loss"])


def phase(**values: Any) -> Phase:
    return plan_phases({"it": PhaseConfig.model_validate(values)}, steps_per_epoch=10, num_classes=3)[0]


def judged(evaluations: list[tuple[float, float]], monitor: str, **values: Any) -> tuple[list[bool], list[str | None], TrainState]:
    """What each evaluation, a step after the one before, was a gain and gave as the phase's end."""
    made, state, gains, ends = phase(**values), TrainState(), [], []
    for number, (top1, loss) in enumerate(evaluations, 1):
        state.step = state.phase.step = number
        verdict = judge({"top1": top1, "loss": loss}, made, state, monitor=monitor)
        gains.append(verdict.gain)
        ends.append(verdict.end)
    return gains, ends, state


def ranks(evaluations: list[tuple[float, float]], monitor: str) -> list[float]:
    """The monitored values, so that more is better."""
    return [top1 if monitor == "top1" else -loss for top1, loss in evaluations]


@given(EVALUATIONS, MONITORS, st.integers(1, 4))
def test_patience_counts_evaluations_since_the_last_better_value(evaluations: list[tuple[float, float]], monitor: str, patience: int) -> None:
    _, ends, _ = judged(evaluations, monitor, early_stop={"patience": patience})
    values = ranks(evaluations, monitor)
    for number, end in enumerate(ends):
        first_of_best = values.index(max(values[: number + 1]))
        assert (end is not None) == (number - first_of_best >= patience), (number, end)
        assert end in (None, f"no better {monitor} in {patience} evaluation{'s' * (patience > 1)}")


@given(EVALUATIONS, MONITORS, st.sampled_from(VALUES))
def test_a_threshold_ends_the_phase_where_it_is_reached(evaluations: list[tuple[float, float]], monitor: str, threshold: float) -> None:
    _, ends, _ = judged(evaluations, monitor, early_stop={"threshold": threshold})
    for (top1, loss), end in zip(evaluations, ends):
        reached = top1 >= threshold if monitor == "top1" else loss <= threshold
        assert end == (f"{monitor} {top1 if monitor == 'top1' else loss:.4f} reached {threshold}" if reached else None)


@given(EVALUATIONS, MONITORS)
def test_without_either_nothing_ends_early(evaluations: list[tuple[float, float]], monitor: str) -> None:
    assert set(judged(evaluations, monitor)[1]) == {None}


@given(EVALUATIONS, MONITORS, st.sampled_from(["one_se", "best", "last"]))
def test_what_is_a_gain(evaluations: list[tuple[float, float]], monitor: str, keep: str) -> None:
    """The best, and among equals the one with the lower loss, the first of those; whatever is kept."""
    gains, _, state = judged(evaluations, monitor, keep=keep)
    order = [(value, -loss) for value, (_, loss) in zip(ranks(evaluations, monitor), evaluations)]
    for number, gain in enumerate(gains):
        assert gain == (order[number] > max(order[:number], default=(-9.0, -9.0)))
    best = order.index(max(order))
    assert (state.results.best["it"].step, state.results.best["it"].loss) == (best + 1, evaluations[best][1])


NUM = 4


def image_by_image(top1: float, loss: float, monitor: str) -> Any:
    """What an evaluation of four images with that top1 and loss finds of each, right images first."""
    values = np.arange(NUM) < NUM * top1 if monitor == "top1" else loss * np.array([0.5, 1.5, 1.5, 0.5])
    columns = np.asarray(values, np.float32)[:, None]
    evaluated = Evaluated(top1 if monitor == "top1" else -loss, loss, np.arange(NUM), np.zeros(NUM, np.int64), columns)
    return SimpleNamespace(all_ranks=lambda runtime, metrics: evaluated)


def kept_by_the_loop(evaluations: list[tuple[float, float]], monitor: str, keep: str) -> tuple[list[bool], ActivePhase, TrainState]:
    """Whether each evaluation's weights were kept; with `one_se` the first one is that of the weights that enter the phase. The weights are the number of
    steps that they have seen."""
    nothing: Any = None
    weights = nn.Linear(1, 1, bias=False).requires_grad_(False)
    network: Any = SimpleNamespace(module=weights)
    active = ActivePhase(phase(keep=keep), network, nothing, nothing, nothing, nothing, nothing, nothing, nothing, (), "", [])
    flags: list[bool] = []
    tracker = SimpleNamespace(val=lambda **event: flags.append(event["kept"]), note=nothing, print=nothing)
    trainer: Any = SimpleNamespace(state=TrainState(), runtime=Runtime.alone("cpu"), tracker=tracker, _val_groups=None)
    for number, (top1, loss) in enumerate(evaluations, int(keep != "one_se")):
        weights.weight.fill_(number)
        trainer.state.step = trainer.state.phase.step = number
        results = image_by_image(top1, loss, monitor) if keep == "one_se" else None
        Trainer._judge(trainer, active, {"top1": top1, "loss": loss}, None, results, monitor, blend=None)
    return flags, active, trainer.state


def standard_error(one: tuple[float, float], other: tuple[float, float], monitor: str) -> float:
    """Of the mean difference, by the formula of any textbook."""
    columns = [image_by_image(*evaluation, monitor).all_ranks(None, None).columns[:, 0].astype(float) for evaluation in (one, other)]
    return float(np.std(columns[0] - columns[1], ddof=1) / np.sqrt(NUM))


def by_the_words(evaluations: list[tuple[float, float]], monitor: str, keep: str) -> list[int]:
    """Which evaluation is kept after each, by what docs/recipes.md says."""
    values, kept, places = ranks(evaluations, monitor), 0, list[int]()
    for new, (_, loss) in enumerate(evaluations):
        best = max(range(new + 1), key=lambda place: (values[place], -evaluations[place][1], -place))
        if keep == "one_se":
            is_worse = [values[best] - values[place] > standard_error(evaluations[best], evaluations[place], monitor) for place in range(new + 1)]
            kept = new if is_worse[kept] or (loss < evaluations[kept][1] and not is_worse[new]) else kept
        else:
            kept = best if keep == "best" else new
        places.append(kept)
    return places


@given(EVALUATIONS, MONITORS, st.sampled_from(["one_se", "best", "last"]))
def test_what_is_kept(evaluations: list[tuple[float, float]], monitor: str, keep: str) -> None:
    """In state.json's `kept`, in the weights and in the history: those of the rule."""
    flags, active, state = kept_by_the_loop(evaluations, monitor, keep)
    places = by_the_words(evaluations, monitor, keep)
    assert flags == [place == number for number, place in enumerate(places)]
    kept = places[-1]
    step = kept + int(keep != "one_se")
    assert state.phase.kept is not None
    assert (state.phase.kept.step, state.phase.kept.val) == (step, dict(zip(("top1", "loss"), evaluations[kept])))
    assert {name: tensor.item() for name, tensor in active.kept.items()} == ({} if keep == "last" else {"weight": step})
    assert state.phase.looks == len(evaluations)


@pytest.mark.parametrize("monitor", ["top1", "loss"])
def test_a_loss_that_falls_at_one_top1_is_a_gain_and_no_reason_to_go_on(monitor: str) -> None:
    gains, ends, _ = judged([(0.5, 1.0), (0.5, 0.75), (0.5, 0.5)], monitor, early_stop={"patience": 2})
    assert gains == [True, True, True]
    assert [end is not None for end in ends] == [False, False, monitor == "top1"]
