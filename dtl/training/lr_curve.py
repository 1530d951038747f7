"""What a range test has measured, and the learning rate that it suggests. Pure arithmetic.

The test is Smith's (2017, arXiv 1506.01186): the rate rises exponentially from step to step, and the loss is watched. The suggestion
lies at two thirds of the way, on the logarithmic scale, from where the smoothed loss begins to fall to where it is lowest: for a fall
over three decades that is the usual tenth of the rate of the lowest loss, and a single noisy step does not move it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

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

    def verdict(self) -> str:
        """One line: what to set, or why nothing can be said."""
        if self.suggestion is None:
            why = "the loss is not finite from the first steps on" if len(self.lrs) < FEWEST_STEPS else "the loss did not fall"
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
