"""Learning rate as a pure function of the step: nothing to save, nothing that a resume could lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from dtl.config import PhaseConfig
from dtl.errors import UserError

Kind = Literal["constant", "step", "cosine", "linear", "one_cycle"]
WARMUP_START = 0.01  # share of lr at the first step of a warm-up
# torch's OneCycleLR by default: the rising part of the phase, lr over the first lr, the first lr over the last.
CYCLE_RISE, CYCLE_START, CYCLE_END = 0.3, 25.0, 1e4


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over a phase. All durations are in optimizer steps, counted from the start of the phase."""

    kind: Kind = "constant"
    warmup_steps: int = 0
    """Linear warm-up from a hundredth of lr; cosine and linear spread over the steps that remain."""
    every_steps: int = 0
    """step: multiply by `gamma` after each so many steps ..."""
    milestones: tuple[int, ...] = ()
    """... or at these steps."""
    gamma: float = 0.1
    final_fraction: float = 0.0
    """cosine, linear: the last learning rate as a fraction of the first."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"schedule must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.warmup_steps < 0:
            raise UserError(f"warmup must not be negative, not {self.warmup_steps} steps")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction must be between 0 and 1, not {self.final_fraction}")
        if self.kind == "step":
            self._check_step()
        if self.kind == "one_cycle" and self.warmup_steps:
            raise UserError("the one_cycle schedule has its own warm-up; set warmup to 0")

    def _check_step(self) -> None:
        if bool(self.every_steps) == bool(self.milestones):
            raise UserError("the step schedule needs either every N epochs or a list of milestones, not both")
        if self.every_steps < 0:
            raise UserError(f"the step schedule's period must be positive, not {self.every_steps} steps")
        if any(later <= earlier for earlier, later in pairwise((0, *self.milestones))):
            raise UserError(f"milestones must be positive and increasing, not {list(self.milestones)}")
        if self.gamma <= 0:
            raise UserError(f"gamma must be positive, not {self.gamma}")


def schedule_of(config: PhaseConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a phase, its durations in steps."""
    every_steps = 0
    milestones: tuple[int, ...] = ()
    if config.schedule == "step":
        if isinstance(config.step_epochs, tuple):
            milestones = tuple(max(1, round(epoch * steps_per_epoch)) for epoch in config.step_epochs)
        else:
            every_steps = max(1, round(config.step_epochs * steps_per_epoch))
    return Schedule(
        kind=config.schedule,
        warmup_steps=round(config.warmup * steps_per_epoch),
        every_steps=every_steps,
        milestones=milestones,
        gamma=config.gamma,
        final_fraction=config.final_lr,
    )


def lr_at(step: int, *, schedule: Schedule, num_steps: int, base_lr: float) -> float:
    """The learning rate of the update that follows `step` finished ones, out of `num_steps` in the phase; a group multiplies its scale."""
    assert step >= 0, step
    assert num_steps > 0, num_steps
    if schedule.kind == "one_cycle":
        return _one_cycle(step, num_steps, base_lr)
    warmup = min(schedule.warmup_steps, num_steps)
    if step < warmup:
        return base_lr * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    return base_lr * _factor(step, schedule, done=min(1.0, (step - warmup) / max(1, num_steps - warmup)))


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


def _one_cycle(step: int, num_steps: int, highest: float) -> float:
    """Up to the highest and down to nearly nothing, as torch.optim.lr_scheduler.OneCycleLR (two phases)."""
    start = highest / CYCLE_START
    turn = CYCLE_RISE * num_steps - 1
    last = num_steps - 1
    if step <= turn:
        return _between(start, highest, step / turn if turn > 0 else 1.0)
    return _between(highest, start / CYCLE_END, min(1.0, (step - turn) / (last - turn)) if last > turn else 1.0)


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))
