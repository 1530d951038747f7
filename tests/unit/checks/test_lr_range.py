"""What a range test's points say: the suggestion, when it is over, and when nothing can be said."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dtl.checks.lr_range import LrCurve, rising_lrs


def curve(noise: float, *, falls_from: float = 1e-4, lowest_at: float = 1e-1, steps: int = 120) -> LrCurve:
    """Flat at 2.3, a fall to 0.5 in the logarithm of the rate, then an explosion."""
    rng = np.random.default_rng(0)
    found = LrCurve("all")
    for lr in rising_lrs(1e-7, 10.0, steps):
        share = np.clip(math.log(lr / falls_from) / math.log(lowest_at / falls_from), 0, 1)
        loss = 2.3 - 1.8 * float(share) + (lr / lowest_at) ** 2 * 0.05
        if not found.add(lr, loss + noise * float(rng.standard_normal())):
            break
    return found


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_the_suggestion_is_in_the_fall_a_tenth_of_the_lowest(noise: float) -> None:
    found = curve(noise)
    assert found.diverged
    assert found.suggestion is not None
    assert 3e-3 < found.suggestion < 5e-2
    lowest = found.lowest
    assert lowest is not None
    assert 4e-2 < found.lrs[lowest] < 4e-1
    assert f"--phases.all.lr {found.suggestion:.2g}" in found.summary()


def test_it_stops_soon_after_the_loss_explodes_and_at_nan() -> None:
    assert len(curve(0.0).lrs) < 120
    found = LrCurve("all")
    assert found.add(0.1, 2.0)
    assert not found.add(0.2, math.nan)
    assert found.diverged
    assert found.losses == [2.0]
    assert "not finite from the start" in found.summary()


def test_a_loss_that_does_not_fall_gives_no_suggestion() -> None:
    flat = LrCurve("head")
    for lr in rising_lrs(1e-7, 1.0, 50):
        flat.add(lr, 2.3)
    assert flat.suggestion is None
    assert flat.summary() == "phase head: no suggestion, the loss did not fall; try --from and --to other rates, or more --steps"


def test_rates_rise_by_one_factor_and_the_json_is_whole() -> None:
    lrs = rising_lrs(1e-5, 1.0, 6)
    assert lrs == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    values = json.loads(json.dumps(curve(0.0).to_json(), allow_nan=False))
    assert set(values) == {"phase", "lrs", "losses", "diverged", "smoothed", "suggestion", "lr_of_lowest_loss"}
    assert len(values["lrs"]) == len(values["losses"]) == len(values["smoothed"])
