"""Pairs of images whose features point the same way: every pair with a cosine of at least a threshold, found without computing all of them.

N images, D features, d of them after a projection. With orthonormal columns P, a unit vector x is P P'x and a rest r, and for two of them

    x.y = P'x . P'y + r_x . r_y <= P'x . P'y + |r_x| |r_y|        (Cauchy-Schwarz on the rest)

so with |r| as one more coordinate, a product of d + 1 numbers is never below the cosine: no pair is lost, whatever P is (here: the principal directions
of some rows). What reaches the threshold so is computed exactly, in float64, pair by pair: a pair's cosine depends on nothing but its two rows.
Libraries that hash images (imagededup) or search graphs of neighbours (fastdup, hnswlib) are faster at 10^7 images, and may miss pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.errors import UserError

MOST_PAIRS = 2_000_000
SCENE = 0.95
"""Cosine of the features from which on two images are of one scene."""
_BLOCK = 4096  # rows; a block of products takes 64 MB
_SAMPLE = 2048  # rows by which the directions and their number are chosen
_NUMBERS = (32, 64, 128, 256, 512)  # of directions
_EXACT = 150  # the time of a pair by itself, in that of a pair within a block of the same number of features
_SLACK = 1e-4  # of float32
_CHUNK = 1024  # pairs computed exactly at once


@dataclass(frozen=True)
class Pairs:
    """Rows `first` < `second` [P] and their cosine [P], sorted by both rows."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def together(cls, parts: list[Pairs]) -> Pairs:
        """Of several shares, sorted."""
        first, second, cosine = (np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "second", "cosine"))
        order = np.lexsort((second, first))
        return cls(first[order], second[order], cosine[order])


def near_pairs(features: Any, threshold: float, *, share: tuple[int, int] = (0, 1), most: int = MOST_PAIRS) -> Pairs:
    """All pairs of rows of `features`, float32 [N,D], with a cosine of at least `threshold`, which is above 0. A row of zeros, or with a NaN, is in none.

    `features` may be a mapped file: it is read block by block. `share` (rank, ranks): only the pairs of this rank's blocks; those of all ranks together are
    the same for any number of ranks. UserError where there are more than `most` pairs.
    """
    assert 0 < threshold <= 1
    norms = _norms(features)
    short = _projected(features, norms, threshold)
    starts = range(0, len(features), _BLOCK)
    blocks = [(one, other) for one in starts for other in starts if one <= other][share[0] :: share[1]]
    found, count = [Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))], 0
    for one, other in blocks:
        first, second = _candidates(features, norms, short, threshold, one, other)
        cosine = _cosines(features, norms, first, second)
        kept = cosine >= threshold
        count += int(kept.sum())
        if count > most:
            raise UserError(f"more than {most:,} pairs of images have a cosine of {threshold:g} or more: raise the threshold")
        found.append(Pairs(first[kept], second[kept], cosine[kept]))
    return Pairs.together(found)


def _norms(features: Any) -> npt.NDArray[np.float64]:
    """[N]; infinity for a row that is in no pair."""
    norms = np.concatenate([np.zeros(0), *(np.linalg.norm(features[at : at + _BLOCK].astype(np.float64), axis=1) for at in range(0, len(features), _BLOCK))])
    return np.where(np.isfinite(norms) & (norms > 0), norms, np.inf)


def _unit(features: Any, norms: npt.NDArray[np.float64], rows: Any) -> Tensor:
    """float32 [n,D]; a row without a direction becomes zeros."""
    of = norms[rows, None].astype(np.float32)
    return torch.from_numpy(np.where(np.isfinite(of), features[rows], np.float32(0)) / of)


def _projected(features: Any, norms: npt.NDArray[np.float64], threshold: float) -> Tensor | None:
    """[N,d+1]: the rows along d directions, and the norm of their rest; None where products of all features take no longer."""
    num_rows, num_features = features.shape
    if num_rows <= _BLOCK:
        return None
    sample = _unit(features, norms, np.unique(np.linspace(0, num_rows - 1, _SAMPLE).astype(np.int64)))
    learn, judge = sample[::2], sample[1::2]
    directions = torch.linalg.eigh(learn.T.double() @ learn.double())[1].flip(1).float()
    costs = {num_features: float(num_features)}
    for number in _NUMBERS:
        if number < num_features:
            short = _shortened(judge, directions[:, :number])
            likely = float((short @ short.T >= threshold).float().mean()) - 1 / len(judge)  # less each row with itself
            costs[number] = number + 1 + min(max(likely, 0.0) * _EXACT, 1.0) * num_features
    best = min(costs, key=lambda number: costs[number])
    if best == num_features:
        return None
    chosen = directions[:, :best].contiguous()
    blocks = [_shortened(_unit(features, norms, slice(at, at + _BLOCK)), chosen) for at in range(0, num_rows, _BLOCK)]
    return torch.cat(blocks)


def _shortened(unit: Tensor, directions: Tensor) -> Tensor:
    along = unit @ directions
    rest = (1 - along.double().square().sum(1)).clamp(min=0) + 1e-6  # a rest that rounding has swallowed
    return torch.cat([along, (rest.sqrt().float() * unit.any(1))[:, None]], dim=1)


def _candidates(
    features: Any, norms: npt.NDArray[np.float64], short: Tensor | None, threshold: float, one: int, other: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of two blocks of rows whose cosine may reach the threshold."""
    least, found = threshold - _SLACK, None
    if short is not None:
        found = _reach(short[one : one + _BLOCK] @ short[other : other + _BLOCK].T, least)
    if found is None or len(found) * _EXACT > _BLOCK * _BLOCK:
        left, right = (_unit(features, norms, slice(at, at + _BLOCK)) for at in (one, other))
        found = _reach(left @ right.T, least)
    first, second = found[:, 0].numpy() + one, found[:, 1].numpy() + other
    kept = first < second
    return first[kept], second[kept]


def _reach(products: Tensor, least: float) -> Tensor:
    rows = torch.nonzero(products.amax(1) >= least)[:, 0]
    inside = torch.nonzero(products[rows] >= least)
    return torch.stack([rows[inside[:, 0]], inside[:, 1]], dim=1)


def _cosines(features: Any, norms: npt.NDArray[np.float64], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    found = np.zeros(len(first))
    for at in range(0, len(first), _CHUNK):
        a, b = first[at : at + _CHUNK], second[at : at + _CHUNK]
        found[at : at + _CHUNK] = np.minimum((features[a].astype(np.float64) * features[b]).sum(axis=1) / (norms[a] * norms[b]), 1.0)
    return found
