"""Pairs of images whose features point the same way: every pair with a cosine of at least a threshold, found without computing all of them.

What two photos of flowers have in common by being photos of flowers says nothing about twins. So `scene_pairs` compares features after whitening, in which a
direction counts the less the more images differ along it (see `whitened`).

N images, D features, d of them after a projection. With orthonormal columns P, a unit vector x is P P'x and a rest r, and for two of them

    x.y = P'x . P'y + r_x . r_y <= P'x . P'y + |r_x| |r_y|        (Cauchy-Schwarz on the rest)

so with |r| as one more coordinate, a product of d + 1 numbers is never below the cosine: no pair is lost, whatever P is (here: the principal directions
of some rows). What reaches the threshold so is computed exactly, in float64, pair by pair: a pair's cosine depends on nothing but its two rows.
Libraries that hash images (imagededup) or search graphs of neighbours (fastdup, hnswlib) are faster at 10^7 images, and may miss pairs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.errors import UserError

MOST_PAIRS = 2_000_000
SCENE = 0.55
"""Cosine of the whitened features from which on two images are of one scene. Chosen on CIFAR-10 (`benchmarks.planted --scenes`): the highest at which nearly
all next shots that were made of its images are named. At 0.5 images are named falsely that have little more than a blank sky in common."""
_BLOCK = 4096  # rows; a block of products takes 64 MB
_SAMPLE = 2048  # rows by which the directions and their number are chosen
_NUMBERS = (32, 64, 128, 256, 512)  # of directions
_EXACT = 150  # the time of a pair by itself, in that of a pair within a block of the same number of features
_SLACK = 1e-4  # of float32
_CHUNK = 1024  # pairs computed exactly at once
_LEARNED = 8192  # rows by which features are whitened
_WIDEST = 4096  # whitened features
_IN_MEMORY = 64 << 20  # bytes of whitened features


@dataclass(frozen=True)
class Pairs:
    """Rows `first` < `second` [P] and their cosine [P], sorted by both rows."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def together(cls, parts: list[Pairs], *, threshold: float = 0, most: int | None = None) -> Pairs:
        """Of several shares, sorted. UserError where these are more than `most`."""
        if most is not None and sum(len(part) for part in parts) > most:
            raise _too_many(threshold, most)
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
            raise _too_many(threshold, most)
        found.append(Pairs(first[kept], second[kept], cosine[kept]))
    return Pairs.together(found)


def _too_many(threshold: float, most: int) -> UserError:
    return UserError(f"more than {most:,} pairs of images have a cosine of {threshold:g} or more: raise the threshold")


def scene_pairs(features: Any, threshold: float = SCENE, *, share: tuple[int, int] = (0, 1), scratch: Path | None = None) -> Pairs:
    """Pairs of images of one scene: `near_pairs` of features after whitening. `scratch`: a folder for a temporary file where they are large."""
    return near_pairs(whitened(features, scratch), threshold, share=share)


def whitened(features: Any, scratch: Path | None = None) -> npt.NDArray[np.float32]:
    """[N,D] less their mean, in coordinates in which their covariance is about the identity; zeros of a row that is the mean, NaN of one with a NaN.

    The covariance is that of n rows, evenly taken. (1 + D/n) times its mean variance is added to its diagonal: the fewer rows, the less it is trusted, so
    that the same threshold does for a hundred images and for many. Of more than _WIDEST features, neighbours are averaged first.
    """
    number, width = len(features), len(_narrow(features[:1])[0]) if len(features) else 0
    found: npt.NDArray[np.float32]
    if scratch is None or 4 * number * width <= _IN_MEMORY:
        found = np.zeros((number, width), np.float32)
    else:
        with tempfile.TemporaryFile(dir=scratch) as file:  # whose place is free again when the array goes
            found = np.memmap(file, np.float32, "w+", shape=(number, width))
    sample = _narrow(features[np.unique(np.linspace(0, number - 1, min(number, _LEARNED)).astype(np.int64))]) if number else np.zeros((0, width))
    sample = sample[np.isfinite(sample).all(axis=1)]
    if not len(sample):
        return found
    mean = sample.mean(axis=0)
    sample -= mean
    covariance = torch.from_numpy(sample.T @ sample / len(sample))
    variance = float(covariance.trace()) / width
    if variance <= _SLACK**2 * float(np.square(mean).mean()):  # all rows are the same but for rounding
        return found
    covariance.diagonal().add_((1 + width / len(sample)) * variance)
    across = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), torch.eye(width, dtype=torch.float64), upper=False).T.numpy()
    for at in range(0, number, _BLOCK):
        found[at : at + _BLOCK] = (_narrow(features[at : at + _BLOCK]) - mean) @ across
    return found


def _narrow(rows: Any) -> npt.NDArray[np.float64]:
    """float64 [n,D], D at most _WIDEST: the mean of some neighbours each."""
    wide = np.asarray(rows, np.float64).reshape(len(rows), -1)
    each = -(-wide.shape[1] // _WIDEST)
    if each < 2:
        return wide.copy()
    return np.add.reduceat(wide, np.arange(0, wide.shape[1], each), axis=1) / each


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
