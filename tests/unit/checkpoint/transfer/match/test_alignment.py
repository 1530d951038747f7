"""Sequence alignment against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtl.checkpoint.transfer.match.alignment import IMPOSSIBLE, align


def brute_force(scores: np.ndarray[Any, Any]) -> float:
    from functools import lru_cache

    @lru_cache(None)
    def best(i: int, j: int, gap: str) -> float:
        if i == scores.shape[0] and j == scores.shape[1]:
            return 0.0
        options = []
        if i < scores.shape[0] and j < scores.shape[1]:
            options.append(scores[i, j] + best(i + 1, j + 1, ""))
        if i < scores.shape[0]:
            options.append(-(0.02 if gap == "s" else 0.6) + best(i + 1, j, "s"))
        if j < scores.shape[1]:
            options.append(-(0.02 if gap == "t" else 0.6) + best(i, j + 1, "t"))
        return max(options)

    return best(0, 0, "")


@pytest.mark.parametrize("seed", range(8))
def test_alignment_equals_brute_force_and_knows_every_alternative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([IMPOSSIBLE, 1.0, 2.0], size=(rng.integers(1, 7), rng.integers(1, 7)))
    found = align(scores)
    assert found.best == pytest.approx(brute_force(scores))
    for (i, j), through in np.ndenumerate(found.through):
        if scores[i, j] > 0:
            forced = scores.copy()
            forced[i, j] += 100
            assert through == pytest.approx(brute_force(forced) - 100)
    for j, alone in enumerate(found.skips_target):
        without = scores.copy()
        without[:, j] = IMPOSSIBLE
        assert alone == pytest.approx(brute_force(without))
