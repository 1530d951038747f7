"""How sure a number is: 95 % intervals of shares and of metrics, and whether two networks differ on the same images.

A share of images has Wilson's interval (Wilson 1927; Brown, Cai and DasGupta 2001). Other metrics have the same formula, with the number of independent
images that would give the variance that a bootstrap finds (Korn and Graubard 1998): for plain accuracy both are the same, and a metric of 100 % has an
interval too, where percentiles of a bootstrap have none. Images of one group (patient, camera) are drawn together.

The draws are functions of a seed (`dtl.keyed`), so an interval is the same on any machine and number of ranks. n images, D draws. No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dtl.keyed import uniform

Interval = tuple[float, float]
"""(lowest, highest), both from 0 to 1."""
Array = npt.NDArray[np.float64]
LEVEL = 0.95
_Z = 1.959963984540054
DRAWS = 1000
_CHUNK = 1 << 22  # counts in memory at a time
_MOST_COUNTS = 50_000_000  # of all draws together: more images get fewer draws
FEWEST_DRAWS = 100
MOST_VALUES = _MOST_COUNTS // FEWEST_DRAWS
"""Of more values of images nothing is drawn."""
_DIFFERENT = 0.05


def wilson(share: float | None, n: float) -> Interval | None:
    """Of a share of `n` independent images; None without images."""
    if share is None or not math.isfinite(share) or not n > 0:
        return None
    z2 = _Z * _Z / n
    middle, half = (share + z2 / 2) / (1 + z2), math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    # Rounding must not leave 0.9999999 as the upper end of 1.
    return (0.0 if share <= 0 else max(0.0, middle - half), 1.0 if share >= 1 else min(1.0, middle + half))


def shown(interval: Interval | None) -> str:
    """`91.7 to 98.2`, in percent; empty where there is none."""
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


@dataclass(frozen=True)
class Bootstrap:
    """Draws of n images with replacement (of whole groups, where images have one), the same ones each time it is asked."""

    n: int
    groups: npt.NDArray[np.int64] | None = None
    """A number for each image; equal ones are drawn together."""
    seed: int = 0

    @cached_property
    def _members(self) -> tuple[int, npt.NDArray[np.int64] | None]:
        if self.groups is None:
            return self.n, None
        assert len(self.groups) == self.n
        found, members = np.unique(self.groups, return_inverse=True)
        return len(found), members.astype(np.int64)

    @property
    def num_units(self) -> int:
        """Independent ones: images, or groups."""
        return self._members[0]

    def num_draws(self, per_image: int = 1) -> int:
        """How many draws a metric gets that looks at each image so many times; 0 if that would take too long."""
        draws = min(DRAWS, _MOST_COUNTS // max(1, self.n * per_image)) if self.n else 0
        return draws if draws >= FEWEST_DRAWS else 0

    def counts(self, draws: int) -> Iterator[npt.NDArray[np.int64]]:
        """How often each image is in each draw, int64 [some, n], until there are `draws` rows."""
        units, members = self._members
        at_once = max(1, _CHUNK // max(1, self.n))
        for first in range(0, draws, at_once):
            rows = []
            for draw in range(first, min(draws, first + at_once)):
                drawn = (uniform(np.arange(units), self.seed, "bootstrap", draw) * units).astype(np.int64)
                rows.append(np.bincount(drawn, minlength=units))
            chosen = np.stack(rows)
            yield chosen if members is None else chosen[:, members]

    def variance(self, metric: Callable[[npt.NDArray[np.int64]], Array], per_image: int = 1) -> float | None:
        """Of a metric, `metric(counts [some, n]) -> [some]`, over all draws; None if that would take too long. NaNs are left out."""
        draws = self.num_draws(per_image)
        values = np.concatenate([metric(counts) for counts in self.counts(draws)]) if draws else np.zeros(0)
        values = values[np.isfinite(values)]
        return float(values.var(ddof=1)) if len(values) > 1 else None

    def interval(self, value: float | None, variance: float | None, *, least: float | None = None) -> Interval | None:
        """Of a metric from 0 to 1 with that variance. `least`: the number of images that its value stands on, where no draw differs (by default all)."""
        if value is None or variance is None or not math.isfinite(value):
            return None
        spread = value * (1 - value)
        if spread > 0 and variance > 1e-12 * spread:
            return wilson(value, spread / variance)
        return wilson(value, min(self.num_units, self.num_units if least is None else least))


def accuracy_interval(right: npt.NDArray[np.bool_], bootstrap: Bootstrap) -> Interval | None:
    """Wilson's where images are independent; else by drawing groups."""
    if not len(right):
        return None
    if bootstrap.groups is None:
        return wilson(float(right.mean()), len(right))
    variance = bootstrap.variance(lambda counts: np.asarray((counts @ right) / counts.sum(axis=1), np.float64))
    return bootstrap.interval(float(right.mean()), variance)


# ---- two networks on the same images


@dataclass(frozen=True)
class Paired:
    """Which of two is better, image by image."""

    better: int
    """Images that only the first has right."""
    worse: int

    @property
    def p(self) -> float:
        return mcnemar(self.better, self.worse)

    @property
    def is_different(self) -> bool:
        return self.p < _DIFFERENT

    def __str__(self) -> str:
        verdict = "told apart" if self.is_different else "not told apart"
        return f"better on {self.better:,}, worse on {self.worse:,}: p {_p(self.p)}, {verdict}"


def mcnemar(better: int, worse: int) -> float:
    """The exact, two-sided p of McNemar's test (1947): how likely so uneven a split is if both are equally good."""
    n, fewer = better + worse, min(better, worse)
    if 2 * fewer >= n - 1:
        return 1.0
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(fewer + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}" if value < 0.1 else f"= {value:.2f}"
