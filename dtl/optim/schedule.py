"""Learning rate as a pure function of the step: nothing to save, nothing that a resume could lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from dtl.errors import UserError

Kind = Literal["constant", "step", "cosine", "linear", "one_cycle"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over a phase. All durations are in optimizer steps, counted from the start of the phase."""

    kind: Kind = "constant"
    warmup_steps: int = 0
    """Linear warm-up from `warmup_start * lr`; cosine and linear spread over the steps that remain."""
    warmup_start: float = 0.01
    every_steps: int = 0
    """step: multiply by `gamma` after each so many steps ..."""
    milestones: tuple[int, ...] = ()
    """... or at these steps."""
    gamma: float = 0.1
    final_fraction: float = 0.0
    """cosine, linear: the last learning rate as a fraction of the first."""
    pct_start: float = 0.3
    """one_cycle, as torch's OneCycleLR: the rising part. lr is the maximum, the first is lr / div_factor, the last lr / div / final_div."""
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: Literal["cos", "linear"] = "cos"
    base_momentum: float | None = None
    """one_cycle: with both given, momentum falls from `max_momentum` to `base_momentum` while the learning rate rises, and comes back."""
    max_momentum: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"schedule must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.warmup_steps < 0:
            raise UserError(f"warmup must not be negative, not {self.warmup_steps} steps")
        if not 0 <= self.warmup_start <= 1:
            raise UserError(f"warmup_start must be between 0 and 1, not {self.warmup_start}")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction must be between 0 and 1, not {self.final_fraction}")
        if self.kind == "step":
            self._check_step()
        if self.kind == "one_cycle":
            self._check_one_cycle()

    def _check_step(self) -> None:
        if bool(self.every_steps) == bool(self.milestones):
            raise UserError("the step schedule needs either every N epochs or a list of milestones, and not both")
        if self.every_steps < 0:
            raise UserError(f"the step schedule's period must be positive, not {self.every_steps} steps")
        if any(later <= earlier for earlier, later in pairwise((0, *self.milestones))):
            raise UserError(f"milestones must be positive and rising, not {list(self.milestones)}")
        if self.gamma <= 0:
            raise UserError(f"gamma must be positive, not {self.gamma}")

    def _check_one_cycle(self) -> None:
        if self.warmup_steps:
            raise UserError("the one_cycle schedule has a warm-up of its own (pct_start); leave warmup at 0")
        if not 0 < self.pct_start < 1:
            raise UserError(f"pct_start must be between 0 and 1, not {self.pct_start}")
        if self.div_factor <= 0 or self.final_div_factor <= 0:
            raise UserError("div_factor and final_div_factor must be positive")
        if self.anneal not in ("cos", "linear"):
            raise UserError(f"anneal must be cos or linear, not {self.anneal!r}")
        if (self.base_momentum is None) != (self.max_momentum is None):
            raise UserError("cycling the momentum needs both base_momentum and max_momentum")


def lr_at(step: int, *, schedule: Schedule, num_steps: int, base_lr: float) -> float:
    """The learning rate of the update that follows `step` finished ones, out of `num_steps` in the phase; a group multiplies its scale."""
    assert step >= 0, step
    assert num_steps > 0, num_steps
    if schedule.kind == "one_cycle":
        start = base_lr / schedule.div_factor
        return _one_cycle(step, schedule, num_steps, (start, base_lr, start / schedule.final_div_factor))
    warmup = min(schedule.warmup_steps, num_steps)
    if step < warmup:
        return base_lr * (schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup)
    return base_lr * _factor(step, schedule, done=min(1.0, (step - warmup) / max(1, num_steps - warmup)))


def momentum_at(step: int, *, schedule: Schedule, num_steps: int) -> float | None:
    """The momentum (Adam's beta1) of that update, or None where the schedule leaves it alone."""
    if schedule.kind != "one_cycle" or schedule.base_momentum is None or schedule.max_momentum is None:
        return None
    return _one_cycle(step, schedule, num_steps, (schedule.max_momentum, schedule.base_momentum, schedule.max_momentum))


def _factor(step: int, schedule: Schedule, *, done: float) -> float:
    """`done` is the finished fraction of the steps after the warm-up."""
    final = schedule.final_fraction
    if schedule.kind == "step":
        drops = step // schedule.every_steps if schedule.every_steps else sum(step >= milestone for milestone in schedule.milestones)
        return float(schedule.gamma**drops)
    if schedule.kind == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    if schedule.kind == "linear":
        return 1 + (final - 1) * done
    return 1.0


def _one_cycle(step: int, schedule: Schedule, num_steps: int, values: tuple[float, float, float]) -> float:
    """From the first value to the second and on to the third, as torch.optim.lr_scheduler.OneCycleLR (two phases)."""
    turn = schedule.pct_start * num_steps - 1
    last = num_steps - 1
    if step <= turn:
        return _between(values[0], values[1], step / turn if turn > 0 else 1.0, schedule.anneal)
    return _between(values[1], values[2], min(1.0, (step - turn) / (last - turn)) if last > turn else 1.0, schedule.anneal)


def _between(start: float, end: float, done: float, anneal: str) -> float:
    if anneal == "linear":
        return start + (end - start) * done
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def to_steps(value: int | str, steps_per_epoch: int) -> int:
    """Steps from "3 epochs", "0.5 epochs", "200 steps" or a plain number of steps. Durations become steps once, here."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"a duration is a number of steps or a text such as '3 epochs', not {value!r}")
    if isinstance(value, int):
        number, unit = float(value), "steps"
    else:
        text, _, unit = value.strip().partition(" ")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
    if not math.isfinite(number) or number < 0 or unit.strip() not in ("step", "steps", "epoch", "epochs", ""):
        raise UserError(f"a duration is a number of steps or a text such as '3 epochs', not {value!r}")
    return round(number * (steps_per_epoch if unit.strip().startswith("epoch") else 1))
