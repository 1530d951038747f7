"""early_stop.patience and early_stop.threshold, and what is the best, from the config to what an evaluation means for its phase."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtl.checkpoint.resume.state import TrainState
from dtl.config import PhaseConfig
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
    """The best, and among equals the one with the lower loss, the first of those."""
    gains, _, state = judged(evaluations, monitor, keep=keep)
    order = [(value, -loss) for value, (_, loss) in zip(ranks(evaluations, monitor), evaluations)]
    for number, gain in enumerate(gains):
        assert gain == (order[number] > max(order[:number], default=(-9.0, -9.0)))
    best = order.index(max(order))
    assert (state.results.best["it"].step, state.results.best["it"].loss) == (best + 1, evaluations[best][1])


@pytest.mark.parametrize("monitor", ["top1", "loss"])
def test_a_loss_that_falls_at_one_top1_is_a_gain_and_no_reason_to_go_on(monitor: str) -> None:
    gains, ends, _ = judged([(0.5, 1.0), (0.5, 0.75), (0.5, 0.5)], monitor, early_stop={"patience": 2})
    assert gains == [True, True, True]
    assert [end is not None for end in ends] == [False, False, monitor == "top1"]
