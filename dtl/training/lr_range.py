"""A range test of the learning rate on a phase as it would be trained: same network, data, optimizer, loss and ranks; nothing stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Flags, Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.models.normalise import Normalise
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.lr_curve import LrCurve, rising_lrs
from dtl.training.snapshot import undone
from dtl.training.step import Stepper, Window, normaliser

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
    say: Callable[[str], None] = lambda line: None,
) -> LrCurve:
    """Train `num_steps` steps at rates from `first` to `last`, until the loss diverges, and put everything back.

    All ranks call it together and get the same curve: losses are those of the global batch, and when to stop is agreed upon.
    Weights, statistics of norms, optimizer, moving average, gradient scaler and generators are afterwards bit for bit as before.
    `stop` is asked before each step; where it is true on any rank, all raise SweepStopped. `say` gets a line every ten steps or seconds.
    Raises UserError for damaged samples, and for rates or steps that make no test.
    """
    if not 0 < first < last:
        raise UserError(f"the learning rates must rise from above 0: got {first:g} to {last:g}")
    if num_steps < 10:
        raise UserError(f"{num_steps} steps are too few for a range test; 50 to 200 are usual")
    sweep = _Sweep(**{entry.name: getattr(active, entry.name) for entry in fields(ActivePhase)})
    sweep.ema = None
    sweep.lrs = rising_lrs(first, last, num_steps)
    phase = replace(active.phase, num_steps=num_steps)
    stepper = Stepper(sweep, runtime, normalise=normalise, seed=seed, heart=heart or Heartbeat())
    curve = LrCurve(phase.name)
    told = time.monotonic()
    with undone(active, runtime), closing(loaders.train_steps(phase, 0)) as stream:  # type: ignore[type-var]
        for step in range(num_steps):
            batches = next(stream)
            if _check(batches, runtime, stop=stop()):
                raise SweepStopped(f"after {step} of {num_steps} steps")
            window = Window()
            weight = normaliser(sweep, loaders.step_labels(phase, step))
            lr = stepper.step(batches, step=step, phase_step=step, normaliser=weight, window=window)
            loss = runtime.sum_floats(window.sum())[0] / weight
            if (step + 1) % STEPS_SILENT == 0 or time.monotonic() - told > SECONDS_SILENT:
                say(f"step {step + 1}/{num_steps}  lr {lr:.2e}  loss {loss:.4f}")
                told = time.monotonic()
            if not runtime.agree(curve.add(lr, loss)):
                say(f"step {step + 1}/{num_steps}  lr {lr:.2e}  loss {loss:.4f}: it diverges, the test is over")
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
