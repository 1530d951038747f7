"""Alignment of two sequences with affine gaps, and what holds in every near-optimal alignment.

Gotoh's algorithm (1982), once forward and once backward: the sum of both through a cell is the best score of any alignment
that pairs these two, so one pass over a pair of matrices tells how much worse every alternative is. Rows are computed with
numpy; 400 by 400 units take about 20 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
IMPOSSIBLE = -1e9
GAP_OPEN = 0.6
GAP_EXTEND = 0.02


@dataclass(frozen=True)
class Alignment:
    """`best`: the optimal score. `through[i, j]`: the best score of an alignment that pairs source i with target j.

    `skips_target[j]`, `skips_source[i]`: the best score of an alignment that leaves that one alone.
    """

    best: float
    through: Scores
    skips_target: Scores
    skips_source: Scores


def align(scores: Scores) -> Alignment:
    """Align source (rows) with target (columns); `scores` holds IMPOSSIBLE where two must not be paired."""
    pair, skip_source, skip_target = _forward(scores)
    pair_back, source_back, target_back = (matrix[::-1, ::-1] for matrix in _forward(scores[::-1, ::-1]))
    best = float(max(pair[-1, -1], skip_source[-1, -1], skip_target[-1, -1]))
    through = pair[1:, 1:] + pair_back[:-1, :-1] - scores
    through[scores < IMPOSSIBLE / 2] = IMPOSSIBLE
    # Both halves paid for opening the same gap.
    skips_target = (skip_target[:, 1:] + target_back[:, :-1]).max(axis=0) + GAP_OPEN
    skips_source = (skip_source[1:, :] + source_back[:-1, :]).max(axis=1) + GAP_OPEN
    return Alignment(best, through, skips_target, skips_source)


def _forward(scores: Scores) -> tuple[Scores, Scores, Scores]:
    """Best score of each prefix that ends in a pair, in a skipped source, in a skipped target."""
    num_source, num_target = scores.shape
    pair, skip_source, skip_target = (np.full((num_source + 1, num_target + 1), IMPOSSIBLE) for _ in range(3))
    pair[0, 0] = 0.0
    steps = np.arange(num_target + 1)
    for i in range(num_source + 1):
        if i:
            before = np.maximum(np.maximum(pair[i - 1], skip_source[i - 1]), skip_target[i - 1])
            pair[i, 1:] = scores[i - 1] + before[:-1]
            skip_source[i] = np.maximum(np.maximum(pair[i - 1], skip_target[i - 1]) - GAP_OPEN, skip_source[i - 1] - GAP_EXTEND)
        # A gap from column k to j costs open + extend * (j - k - 1): a running maximum replaces the loop over k.
        opened = np.maximum(pair[i], skip_source[i]) + GAP_EXTEND * steps
        reach = np.maximum.accumulate(opened)
        skip_target[i, 1:] = reach[:-1] - GAP_OPEN - GAP_EXTEND * (steps[1:] - 1)
    return pair, skip_source, skip_target
