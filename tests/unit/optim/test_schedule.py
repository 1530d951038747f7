"""The learning rate is a pure function of the step, and torch's schedulers say the same, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from dtl.errors import UserError
from dtl.optim.schedule import Schedule, lr_at

BASE = 0.3


def _torch_curve(make: Callable[[torch.optim.Optimizer], Any], num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE, momentum=0.9)
    scheduler = make(optimizer)
    curve = []
    for _ in range(num_steps):
        curve.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return curve


def _curve(schedule: Schedule, num_steps: int) -> list[float]:
    return [lr_at(step, schedule=schedule, num_steps=num_steps, base_lr=BASE) for step in range(num_steps)]


def _sequence(warmup: int, start: float, after: Callable[[torch.optim.Optimizer], Any]) -> Callable[[torch.optim.Optimizer], Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        rising = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [rising, after(optimizer)], milestones=[warmup])

    return make


N = 40
PAIRS = [
    (Schedule("constant"), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    (Schedule("step", every_steps=7), lambda o: lr_scheduler.StepLR(o, 7, gamma=0.1)),
    (Schedule("step", milestones=(3, 20, 21), gamma=0.5), lambda o: lr_scheduler.MultiStepLR(o, [3, 20, 21], gamma=0.5)),
    (Schedule("cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, N)),
    (Schedule("cosine", final_fraction=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, N, eta_min=0.1 * BASE)),
    (Schedule("linear", final_fraction=0.2), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=N)),
    (Schedule("constant", warmup_steps=9), lambda o: lr_scheduler.LinearLR(o, 0.01, total_iters=9)),
    (Schedule("cosine", warmup_steps=8), _sequence(8, 0.01, lambda o: lr_scheduler.CosineAnnealingLR(o, N - 8))),
    (Schedule("linear", warmup_steps=5), _sequence(5, 0.01, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=N - 5))),
    (Schedule("one_cycle"), lambda o: lr_scheduler.OneCycleLR(o, BASE, total_steps=N + 1)),
]


@pytest.mark.parametrize(("schedule", "theirs"), PAIRS, ids=lambda value: getattr(value, "kind", ""))
def test_as_torch(schedule: Schedule, theirs: Callable[[torch.optim.Optimizer], Any]) -> None:
    # torch's OneCycleLR refuses the step after the last one, so it is made one step longer, and ours with it.
    total = N + 1 if schedule.kind == "one_cycle" else N
    expected = _torch_curve(theirs, N)
    assert _curve(schedule, total)[:N] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_short_phases(kind: Any, num_steps: int) -> None:
    """Every step of the shortest phases has a finite, positive learning rate of at most the base."""
    for warmup in (0,) if kind == "one_cycle" else (0, 1, 5):
        curve = _curve(Schedule(kind, warmup_steps=warmup), num_steps)
        assert all(math.isfinite(lr) and 0 < lr <= BASE * (1 + 1e-12) for lr in curve), curve


def test_ends() -> None:
    assert lr_at(N, schedule=Schedule("cosine", final_fraction=0.1), num_steps=N, base_lr=1.0) == pytest.approx(0.1)
    assert lr_at(N + 5, schedule=Schedule("linear", final_fraction=0.1), num_steps=N, base_lr=1.0) == pytest.approx(0.1)
    one_cycle = Schedule("one_cycle")
    assert lr_at(0, schedule=one_cycle, num_steps=N, base_lr=1.0) == pytest.approx(1 / 25)
    assert lr_at(N - 1, schedule=one_cycle, num_steps=N, base_lr=1.0) == pytest.approx(1 / 25 / 1e4)


def test_the_step_schedule_counts_from_the_start_of_the_phase() -> None:
    curve = _curve(Schedule("step", every_steps=10, warmup_steps=3), 30)
    assert curve[9] == BASE
    assert curve[10] == pytest.approx(BASE * 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosin"}, "schedule must be one of constant, step, cosine, linear, one_cycle, not 'cosin'"),
        ({"warmup_steps": -1}, "warmup must not be negative"),
        ({"final_fraction": 1.5}, "final_fraction must be between 0 and 1"),
        ({"kind": "step"}, "either every N epochs or a list of milestones"),
        ({"kind": "step", "every_steps": 3, "milestones": (4,)}, "not both"),
        ({"kind": "step", "every_steps": -3}, "period must be positive"),
        ({"kind": "step", "milestones": (4, 4)}, "positive and increasing"),
        ({"kind": "step", "milestones": (0, 4)}, "positive and increasing"),
        ({"kind": "step", "every_steps": 3, "gamma": 0}, "gamma must be positive"),
        ({"kind": "one_cycle", "warmup_steps": 3}, "its own warm-up"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**arguments)
