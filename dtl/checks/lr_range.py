"""A range test of the learning rate on a phase as it would be trained: same network, data, optimizer, loss and ranks; nothing stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Flags, Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.models.network import Normalise
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.micro_batch import restored_afterwards
from dtl.training.step import Stepper, Window, normaliser

# ---- the curve


RUNNING = 0.8
DIVERGED_AT = 4.0
FEWEST_STEPS = 10


@dataclass
class LrCurve:
    """The points of one range test, in order, and what follows from them."""

    phase: str
    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Mean over the global batch, as measured before each step."""
    diverged: bool = False
    """Ended early: the loss was not finite, or far above its lowest."""
    _average: float = 0.0
    _least: float = math.inf

    def add(self, lr: float, loss: float) -> bool:
        """Take a step's loss; False when the test is over because the loss has diverged."""
        if not math.isfinite(loss):
            self.diverged = True
            return False
        self.lrs.append(lr)
        self.losses.append(loss)
        self._average = RUNNING * self._average + (1 - RUNNING) * loss
        now = self._average / (1 - RUNNING ** len(self.lrs))
        self._least = min(self._least, now)
        self.diverged = len(self.lrs) > FEWEST_STEPS and now > DIVERGED_AT * self._least
        return not self.diverged

    @property
    def smoothed(self) -> list[float]:
        """The losses under a Gaussian window of a thirtieth of the test: not late, as a running mean would be."""
        return [float(value) for value in _smooth(np.array(self.losses))]

    @property
    def lowest(self) -> int | None:
        """The point of the lowest smoothed loss."""
        return int(np.argmin(self.smoothed)) if self.losses else None

    @property
    def suggestion(self) -> float | None:
        """None where there are few points, or the loss falls by less than a fiftieth."""
        if len(self.lrs) < FEWEST_STEPS:
            return None
        loss = np.array(self.smoothed)
        low = int(np.argmin(loss))
        start = float(np.median(loss[: max(3, len(loss) // 10)]))
        fall = start - loss[low]
        if low < 3 or fall < 0.02 * abs(start):
            return None
        begin = int(np.flatnonzero(loss[:low] >= start - 0.1 * fall).max(initial=0))
        return float(self.lrs[begin] * (self.lrs[low] / self.lrs[begin]) ** (2 / 3))

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        low = self.lowest
        return {
            **values,
            "smoothed": self.smoothed,
            "suggestion": self.suggestion,
            "lr_of_lowest_loss": None if low is None else self.lrs[low],
        }

    def summary(self) -> str:
        """One line: what to set, or why nothing can be said."""
        if self.suggestion is None:
            why = "the loss is not finite from the start" if len(self.lrs) < FEWEST_STEPS else "the loss did not fall"
            return f"phase {self.phase}: no suggestion, {why}; try --from and --to other rates, or more --steps"
        low = self.lowest
        assert low is not None
        return (
            f"phase {self.phase}: --phases.{self.phase}.lr {self.suggestion:.2g} "
            f"(the loss falls there, and is lowest at {self.lrs[low]:.2g}{', and diverges soon after' if self.diverged else ''})"
        )


def _smooth(losses: np.ndarray) -> np.ndarray:
    width = max(1.0, len(losses) / 30)
    distance = np.arange(len(losses))[:, None] - np.arange(len(losses))[None, :]
    weights = np.exp(-0.5 * (distance / width) ** 2)
    return np.asarray(weights @ losses / weights.sum(axis=1))


def rising_lrs(first: float, last: float, num_steps: int) -> list[float]:
    """`num_steps` rates from `first` to `last`, each the same multiple of the one before."""
    return [first * (last / first) ** (step / max(num_steps - 1, 1)) for step in range(num_steps)]


SECONDS_SILENT = 10.0
STEPS_SILENT = 10


class SweepStopped(Exception):
    """A rank was asked to stop; all of them have put everything back. The text says how far the test had come."""


class _Sweep(ActivePhase):
    """The phase with another learning rate at each step."""

    lrs: list[float]

    def set_lr(self, phase_step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[phase_step] * group["lr_scale"]
        return self.lrs[phase_step]


def find_lr(
    active: ActivePhase,
    loaders: DataLoaders,
    runtime: Runtime,
    *,
    normalise: Normalise,
    seed: int,
    first: float = 1e-6,
    last: float = 10.0,
    num_steps: int = 100,
    heart: Heartbeat | None = None,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = lambda line: None,
) -> LrCurve:
    """Train `num_steps` steps at rates from `first` to `last`, until the loss diverges, and put everything back.

    All ranks call it together and get the same curve: losses are those of the global batch, and when to stop is agreed upon.
    Weights, statistics of norms, optimizer, moving average, gradient scaler and generators are afterwards bit for bit as before.
    `stop` is asked before each step; where it is true on any rank, all raise SweepStopped. `log` gets a line every ten steps or seconds.
    Raises UserError for damaged samples, and for rates or steps that make no test.
    """
    if not 0 < first < last:
        raise UserError(f"the learning rates must be above 0 and increase: got {first:g} to {last:g}")
    if num_steps < 10:
        raise UserError(f"{num_steps} steps are too few for a range test; 50 to 200 are usual")
    sweep = _Sweep(**{entry.name: getattr(active, entry.name) for entry in fields(ActivePhase)})
    sweep.ema = None
    sweep.lrs = rising_lrs(first, last, num_steps)
    phase = replace(active.phase, num_steps=num_steps)
    stepper = Stepper(sweep, runtime, normalise=normalise, seed=seed, heart=heart or Heartbeat())
    curve = LrCurve(phase.name)
    last_logged = time.monotonic()
    with restored_afterwards(active, runtime), closing(loaders.train_steps(phase, 0)) as stream:  # type: ignore[type-var]
        for step in range(num_steps):
            stepper.heart.enter("load", step + 1)
            batches = next(stream)
            if _check(batches, runtime, stop=stop()):
                raise SweepStopped(f"after {step} of {num_steps} steps")
            window = Window()
            weight = normaliser(sweep, loaders.step_labels(phase, step))
            lr = stepper.step(batches, step=step, phase_step=step, normaliser=weight, window=window)
            loss = runtime.sum_floats(window.sum())[0] / weight
            if (step + 1) % STEPS_SILENT == 0 or time.monotonic() - last_logged > SECONDS_SILENT:
                log(f"step {step + 1}/{num_steps}  lr {lr:.2e}  loss {loss:.4f}")
                last_logged = time.monotonic()
            if not runtime.agree(curve.add(lr, loss)):
                log(f"step {step + 1}/{num_steps}  lr {lr:.2e}  loss {loss:.4f}: the loss diverges, the test stops here")
                break
    return curve


def _check(batches: list[Batch], runtime: Runtime, *, stop: bool) -> bool:
    """Whether any rank wants to stop. UserError where a sample of any rank is damaged."""
    bad = [damage for batch in batches for _, damage in batch.bad]
    flags = runtime.exchange(Flags(stop=stop, failed=bool(bad))).result()
    if flags.failed:
        first = next(text for text in runtime.gather(str(bad[0]) if bad else "") if text)
        raise UserError(f"{first}; repack the data without it (dtl pack SRC DST --on-error skip)")
    return flags.stop
