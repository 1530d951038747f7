"""Multinomial logistic regression on features, solved by Newton's method: what SGD on a linear head goes towards, reached and not approached.

N samples with D features, K classes. Minimised over the weights W [K,D] and biases b [K] of a linear layer on features z, m their mean:

    sum_i w_i * cross_entropy(W z_i + b, y_i) / sum_i w_i  +  strength / 2 * (|W|^2 + |b|^2)  +  |W m + b|^2 / (2 * sum_i w_i)

w_i is the weight of sample i (its class weight; 0 for a damaged one). z are the features divided by one number, the root of their mean variance over the
samples that count; W and b are given for the features as they are. What the terms are for (docs/results.md has the numbers):

- One number, and not one for each feature: a pretrained network's features have sizes that mean something; features that hardly vary are mostly noise.
- A bias is penalised as the weight of one feature more that is 1, and features keep their mean. So classes are told apart by a sample's direction, and less
  by its length, which says little of the class (Wang et al. 2019, "SimpleShot", arXiv 1911.04623).
- The last term is as much as a normal prior of variance 1 would say of the mean sample's logits, which many samples overrule. Without it a class's frequency
  is learned beyond what the features leave open: rare classes are taken from a small, long-tailed set, even where the samples to come are as long-tailed.

This is scikit-learn's LogisticRegression without an intercept on features that are turned so that both penalties are one (Pedregosa et al., JMLR 12, 2011;
tests/unit/optim/test_solve.py). Each Newton step is found by conjugate gradients (Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.1), whose
products with the Hessian are passes over the rows. They are taken in the basis of the features' principal components (about 0): there the Hessian is near a
diagonal one, the components' mean squares times the mean of p (1 - p), plus the penalties, which is the preconditioner. Fewer samples than features have no
more components than samples, so that all passes are over [N,N]. The solution is computed in float64 on the CPU, in blocks of rows, so that memory does not
grow with N.

The strength is the one with the lowest cross-entropy on samples that were held out, of a path from strong to weak. Each fold is held out once; of many samples
one fold is enough. One more is counted beside them, of which each class is as likely as any other (Laplace's rule of succession): where few were held out, that
none of them was missed does not say that none will be. The folds are solved side by side, at each strength from where the line through the two solutions before
leads, from rows in float32: that ranks the strengths as float64 does. (To start from the solution before, and to stop as early, does not: what is left of the
start makes the weak strengths look better than they are.)

Sums are taken over up to LANES parts of the rows, always the same ones, by one thread each, and added in the order of the parts: any number of processes and
of threads gives the same bits. The first process alone takes the optimizer's decisions, and finds the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtl.text import counted

LANES = 16
BLOCK = 1024
"""Rows that are in memory as float64 at once, for each lane that is being summed."""
STRENGTHS = tuple(10.0 ** (-exponent / 2) for exponent in range(-2, 13))
"""From 10 to 1e-6, two a decade."""
USUAL_STRENGTH = 0.1
"""Where no sample can be held out."""
FOLDS = 5
ONE_FOLD = 20_000
"""From so many samples on one fold is held out, not each of them."""
PATIENCE = 2
"""Strengths in sequence that are no better than the best before them end a path."""
TOLERANCE, PATH_TOLERANCE = 1e-12, 1e-5
"""The step by which the objective would fall by less is the last one: at the solution this times the strength, which bounds what is left of the logits, and
at those of the folds. Steps converge quadratically: what is left after it is far smaller."""
LEAST_CHANGE, PATH_LEAST_CHANGE = 1e-13, 1e-7
"""Smaller changes of the objective are its rounding."""
COLUMNS = 256
"""Classes times folds that are solved side by side, unless a single fold has more."""
UNSEEN_BIAS = -30.0
"""Of a class that no sample has; the others' biases have mean 0."""
MAX_STEPS, MAX_PRODUCTS = 100, 200
"""Newton steps, and products with the Hessian in each."""
MOST_COMPONENTS = 2048
"""More are not looked for; the features are then taken as they are."""
KEPT = 1 << 25
"""Features up to this number (256 MiB) stay in memory, scaled."""
MOST_VALUES, MOST_BYTES = 1 << 31, 4 << 30
"""Features beyond this number would be passed over for days; beyond this memory a head is too large."""


@dataclass(frozen=True)
class Rows:
    """Samples with their features: any array that numpy can slice, for instance a mapped file."""

    features: np.ndarray
    """[N,D], any floating dtype."""
    labels: Tensor
    """int64 [N]."""
    weights: Tensor
    """float64 [N], 0 or more, not all of them 0."""
    smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes."""


@dataclass(frozen=True)
class Team:
    """The processes that solve together: each calls `solve` with the same arguments."""

    rank: int = 0
    ranks: int = 1
    share: Callable[[Any], Any] = lambda value: value
    """The first process's value, in all."""
    add: Callable[[Tensor], Tensor] = lambda sums: sums
    """The sum of the tensors of all processes, in all; of each entry all but one are 0, so the order does not matter."""
    stop: Callable[[], bool] = lambda: False
    """Asked after each pass over the rows; the same answer in all processes."""
    threads: int = 1


@dataclass(frozen=True)
class Solution:
    weight: Tensor
    """float32 [K,D], for features as they are (their scale is folded in)."""
    bias: Tensor
    """float32 [K]."""
    strength: float
    path: tuple[tuple[float, float], ...]
    """Strengths tried with the cross-entropy on held-out samples and one more of any class; empty where one strength was given."""
    loss: float
    """Weighted mean of the cross-entropy on the samples that were solved for, without the penalty."""
    passes: int
    """Over all rows."""
    converged: bool


class Interrupted(Exception):
    """`Team.stop` said so."""


def deal(labels: np.ndarray, units: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """int64 [N]: the fold that holds each sample out, -1 for none; None where nothing can be held out.

    `units` int64 [N]: samples with one number go into one fold (a group, or copies of an image). `order` [N]: a number that shuffles, by unit. The units of
    a class are dealt to the folds in turn.
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    label = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(label, unit, labels)
    dealt = np.empty(len(first), np.int64)
    dealt[np.lexsort((order[first], label))] = np.arange(len(first)) % FOLDS
    folds = np.asarray(dealt[unit])
    if len(first) < 2:
        return None
    return np.where(folds == 0, 0, -1) if len(labels) >= ONE_FOLD else folds


def too_large(num_samples: int, num_features: int, num_classes: int) -> str:
    """Why the head of so many features and classes is not solved; "" where it can be. The same for any number of processes."""
    needed = bytes_needed(num_samples, num_features, num_classes)
    if num_samples * num_features > MOST_VALUES:
        return f"{counted(num_samples, 'image')} with {counted(num_features, 'feature')} are too many to solve for"
    if needed > MOST_BYTES:
        return f"it takes {needed / 2**30:.1f} GiB for {counted(num_classes, 'class')} of {counted(num_features, 'feature')}"
    return ""


def bytes_needed(num_samples: int, num_features: int, num_classes: int) -> int:
    """Of memory in each process, at the most; the features themselves aside."""
    lanes, columns = _num_lanes(num_samples), max(num_classes, min(COLUMNS, FOLDS * num_classes))
    layers = (2 * lanes + 16) * columns + 2 * FOLDS * num_classes
    basis = 3 * min(num_features, MOST_COMPONENTS) * num_features
    kept = min(num_samples * num_features, KEPT) if num_samples * num_features <= KEPT else 0
    return 8 * (layers * (num_features + 1) + lanes * BLOCK * (2 * num_features + 4 * columns) + basis + 2 * kept + (6 + 4 * FOLDS) * num_samples)


def _num_lanes(num_samples: int) -> int:
    return max(1, min(LANES, num_samples // BLOCK))


def solve(
    rows: Rows,
    *,
    num_classes: int,
    folds: np.ndarray | None,
    strengths: Sequence[float] = STRENGTHS,
    team: Team | None = None,
) -> Solution:
    """`folds`: see `deal`; None, or a single one of `strengths`: nothing is held out. Interrupted on all processes where the team stops."""
    problem = _Problem(rows, num_classes, team or Team())
    try:
        path: list[tuple[float, float]] = []
        strength, start = strengths[0] if len(strengths) == 1 else USUAL_STRENGTH, problem.zeros()
        if len(strengths) > 1 and folds is not None:
            path, start = problem.path(torch.from_numpy(folds), strengths)
            strength = min(path, key=lambda tried: tried[1])[0] if path else strength
        found = problem.minimise([problem.side(rows.weights)], strength, start, tolerance=TOLERANCE * strength)
        weight = problem.for_features(found.at[0, :, :-1])
        bias = found.at[0, :, -1] - weight @ problem.constant
        loss = float(found.losses[0, 0]) / float(rows.weights.sum())
        return Solution(weight.float(), bias.float(), strength, tuple(path), loss, problem.passes, found.converged)
    finally:
        problem.close()


@dataclass(frozen=True)
class Side:
    """Samples to learn from, and others to ask."""

    inside: Tensor
    """float64 [N]: weights."""
    known: Tensor
    """bool [K]: the classes inside."""
    mean: Tensor
    """float64 [P + 1]: of those inside, and the 1 that a bias is the weight of."""
    outside: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """For S sides."""

    at: Tensor
    """float64 [S,K,P + 1]."""
    losses: Tensor
    """float64 [S,3]: weighted sums of the cross-entropy inside, of that outside, and of that outside were each known class as likely as any other."""
    converged: bool


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[S,1,1]"""
    return (a * b).sum((1, 2), keepdim=True)


def _conjugate_gradients(product: Callable[[Tensor], Tensor], gradient: Tensor, diagonal: Tensor, enough: float, moves: Tensor) -> Tensor:
    """The Newton steps [S,K,P + 1], as exactly as they are worth: Hessian times step = -gradient. `diagonal`: near the Hessian's. `moves` bool [S,1,1]: the
    others have no step."""
    step, rest = torch.zeros_like(gradient), -gradient
    direction = rest / diagonal
    left = first = _dot(rest, direction)
    small_enough = (first * first.clamp_max(0.0625)).clamp_min(enough)
    for _ in range(MAX_PRODUCTS):
        moves = moves & (left > small_enough)
        if not moves.any():
            break
        curved = product(direction)
        length = torch.where(moves, left / _dot(direction, curved), 0.0)
        step += length * direction
        rest -= length * curved
        scaled = rest / diagonal
        before, left = left, _dot(rest, scaled)
        direction = torch.where(moves, scaled + left / before * direction, 0.0)
    return step


class _Problem:
    def __init__(self, rows: Rows, num_classes: int, team: Team) -> None:
        self.rows, self.num_classes, self.team = rows, num_classes, team
        num_samples, self.num_features = rows.features.shape
        self.num_lanes = _num_lanes(num_samples)
        edges = [lane * num_samples // self.num_lanes for lane in range(self.num_lanes + 1)]
        self.lanes = [(edges[lane], edges[lane + 1]) for lane in range(team.rank, self.num_lanes, team.ranks)]
        self._kept: dict[int, Tensor] | None = {} if num_samples * self.num_features <= KEPT else None
        self._probabilities: dict[int, Tensor] = {}
        """Of the gradient before, by the first row of each block; empty where these are too many."""
        self._dtype = torch.float64
        """Of the rows."""
        self.basis: Tensor | None = None
        self._turned: Tensor | None = None
        """[N,P]: the features in the basis, of fewer samples than features."""
        self.passes = 0
        self._pool = ThreadPoolExecutor(max(1, team.threads))
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a product split among threads adds in another order
        used = (rows.weights > 0).double()
        size = self.num_features
        count = float(used.sum())
        mean = self.sums(lambda x, part: used[part] @ x, size, scaled=False) / count
        squares = self.sums(lambda x, part: used[part] @ (x - mean).square_(), size, scaled=False)
        variances = squares / count
        # A feature that is constant would be a second bias, and stays constant, whatever rounding makes of it: it is taken away.
        varies = variances.sqrt() > 1e-7 * mean.abs().clamp_min(1e-30)
        self.constant = mean.masked_fill(varies, 0.0)
        self.scale = float(variances[varies].mean().sqrt()) if varies.any() else 1.0
        # Where no feature varies they are all 0 now, and have no components.
        usual = None, torch.ones(size, dtype=torch.float64)
        self.basis, self.variances = team.share(None if team.rank else self._components() if varies.any() else usual)
        if self.basis is not None and num_samples < self.num_features:
            self.roots = (self.variances * num_samples).sqrt()
            self._kept, self._turned, self.num_features = {}, self.basis * self.roots, len(self.variances)

    def _components(self) -> tuple[Tensor | None, Tensor]:
        """[D,P] and [P]: the principal components of the features about 0, and their mean squares. Of many rows some thousands say enough: they only make it
        fast. Of fewer samples than features [N,P]: each sample's part in each component, of length 1, which is found without the components."""
        num_samples, size = len(self.rows.labels), self.num_features
        if min(num_samples, size) > MOST_COMPONENTS:
            return None, torch.ones(size, dtype=torch.float64)
        stride = max(1, num_samples // (2 * MOST_COMPONENTS))
        x = torch.cat([self._block(slice(start, min(start + BLOCK * stride, num_samples), stride), True) for start in range(0, num_samples, BLOCK * stride)])
        if num_samples < size:
            values, vectors = torch.linalg.eigh(x @ x.T)
            real = values > values[-1].clamp_min(1e-300) * 1e-12
            return vectors[:, real].contiguous(), values[real] / len(x)
        values, vectors = torch.linalg.eigh(x.T @ x)
        return vectors, values.clamp_min(0) / len(x)

    def close(self) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)

    def zeros(self, sides: int = 1) -> Tensor:
        return torch.zeros(sides, self.num_classes, len(self.variances) + 1, dtype=torch.float64)

    def _block(self, part: slice, scaled: bool) -> Tensor:
        kept = None if self._kept is None or not scaled else self._kept.get(part.start)
        if kept is not None:
            return kept
        if scaled and self._turned is not None:
            x = self._turned[part].clone()
        else:
            # In torch's own memory: a product's last bits may depend on where in memory its rows begin.
            x = torch.empty(len(range(part.start, part.stop, part.step or 1)), self.rows.features.shape[1], dtype=torch.float64)
            np.copyto(x.numpy(), self.rows.features[part])
            if scaled:
                x.sub_(self.constant).div_(self.scale)
        x = x.to(self._dtype)
        if scaled and self._kept is not None and part.step is None:
            self._kept[part.start] = x
        return x

    def _compute_in(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        if self._kept is not None:
            self._kept = {}

    def for_features(self, weights: Tensor) -> Tensor:
        """[K,D], for features as they are, of weights [K,P] in the basis."""
        if self._turned is None:
            return (weights if self.basis is None else weights @ self.basis.T) / self.scale
        by_sample = weights / self.roots @ self._turned.div(self.roots).T
        found = torch.zeros(self.num_classes, len(self.constant), dtype=torch.float64)
        for start in range(0, by_sample.shape[1], BLOCK):
            part = slice(start, min(start + BLOCK, by_sample.shape[1]))
            found += by_sample[:, part] @ self._block(part, False).sub_(self.constant).div_(self.scale)
        return found / self.scale

    def _weights(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """[S * K, D] and [S, K]: the weights of the features as the blocks have them, and the biases."""
        flat = at[:, :, :-1].reshape(-1, at.shape[2] - 1)
        return (flat if self.basis is None or self._turned is not None else flat @ self.basis.T).to(self._dtype), at[:, :, -1].to(self._dtype)

    def _in_basis(self, sums: Tensor, sides: int, classes: int) -> Tensor:
        """[S, K, P + 1] of the sums [S * K * D + S * K] by weights and biases."""
        size = sides * classes * self.num_features
        by_weight = sums[:size].view(sides * classes, -1)
        by_weight = by_weight if self.basis is None or self._turned is not None else by_weight @ self.basis
        return torch.cat([by_weight.view(sides, classes, -1), sums[size : size + sides * classes].view(sides, -1, 1)], dim=2)

    def sums(self, of: Callable[[Tensor, slice], Tensor], size: int, *, scaled: bool = True) -> Tensor:
        """[size]: the sum of of(features of some rows, which rows) over all rows of all processes."""

        def lane(edges: tuple[int, int]) -> Tensor:
            total = torch.zeros(size, dtype=torch.float64)
            for start in range(edges[0], edges[1], BLOCK):
                part = slice(start, min(start + BLOCK, edges[1]))
                total += of(self._block(part, scaled), part)
            return total

        everyones = torch.zeros(self.num_lanes, size, dtype=torch.float64)
        for number, value in enumerate(self._pool.map(lane, self.lanes)):
            everyones[self.team.rank + number * self.team.ranks] += value  # 0 + -0 is 0, as in the sum over processes
        everyones = self.team.add(everyones)
        self.passes += 1
        if self.team.stop():
            raise Interrupted
        return reduce(torch.add, everyones.unbind())

    def side(self, inside: Tensor) -> Side:
        used = (inside > 0).double()
        mean = self._in_basis(torch.cat([self.sums(lambda x, part: used[part] @ x, self.num_features), used.sum()[None]]), 1, 1)[0, 0]
        return Side(inside, torch.bincount(self.rows.labels, weights=inside, minlength=self.num_classes) > 0, mean / mean[-1])

    def _gradient(self, at: Tensor, sides: Sequence[Side]) -> Tensor:
        """[S * K * D + S * K + 4 * S]: the sums of the gradients by W and by b, of p (1 - p), and the losses of `Found` [S,3]."""
        w, b = self._weights(at)
        smoothing, num_sides, labels = self.rows.smoothing, len(sides), self.rows.labels
        inside = torch.stack([side.inside for side in sides], dim=1)
        outside = torch.stack([torch.zeros_like(side.inside) if side.outside is None else side.outside for side in sides], dim=1)
        known = torch.stack([side.known for side in sides]).to(self._dtype)
        known /= known.sum(1, keepdim=True).clamp_min(1)
        self._probabilities = {}
        keep = len(labels) * num_sides * self.num_classes <= KEPT

        def gradient(x: Tensor, part: slice) -> Tensor:
            label, weight, held = labels[part], inside[part], outside[part]
            logs = torch.log_softmax((w @ x.T).T.contiguous().view(len(x), num_sides, -1) + b, dim=2)
            each = torch.arange(len(x))
            losses = -(1 - smoothing) * logs[each, :, label] - smoothing * logs.mean(dim=2)
            sums = [(losses * weight).sum(0), (losses * held).sum(0), -((logs * known).sum(2) * held).sum(0)]
            error = logs.exp_()
            if keep:
                self._probabilities[part.start] = error.clone()
            curvature = (weight * (1 - error.square().sum(2))).sum(0)
            error -= smoothing / self.num_classes
            error[each, :, label] -= 1 - smoothing
            error *= weight[:, :, None]
            return torch.cat([(error.view(len(x), -1).T @ x).flatten(), error.sum(0).flatten(), curvature, torch.stack(sums, dim=1).flatten()])

        return self.sums(gradient, num_sides * (self.num_classes * (self.num_features + 1) + 4))

    def _product(self, direction: Tensor, at: Tensor, sides: Sequence[Side]) -> Tensor:
        """[S * K * D + S * K]: the sums of the Hessians at `at`, where the last gradient was taken, times a direction."""
        (w, b), (v, c), num_sides = self._weights(at), self._weights(direction), len(sides)
        inside = torch.stack([side.inside for side in sides], dim=1)

        def product(x: Tensor, part: slice) -> Tensor:
            p = self._probabilities.get(part.start)
            if p is None:
                p = torch.softmax((w @ x.T).T.contiguous().view(len(x), num_sides, -1) + b, dim=2)
            change = ((v @ x.T).T.contiguous().view(len(x), num_sides, -1) + c).mul_(p)
            change -= p * change.sum(2, keepdim=True)
            change *= inside[part][:, :, None]
            return torch.cat([(change.view(len(x), -1).T @ x).flatten(), change.sum(0).flatten()])

        return self.sums(product, num_sides * self.num_classes * (self.num_features + 1))

    def minimise(self, sides: Sequence[Side], strength: float, start: Tensor, *, tolerance: float) -> Found:
        """The solutions for the samples inside, from `start` [S,K,P + 1], and whether all were reached."""
        share = self.team.share
        if self.team.rank:  # the first process says which sums are wanted, and where
            while (wanted := share(None)) is not None:
                at, direction = wanted
                self._gradient(at, sides) if direction is None else self._product(direction, at, sides)
            everyones: Found = share(None)
            return everyones
        num, least = len(sides), LEAST_CHANGE if self._dtype == torch.float64 else PATH_LEAST_CHANGE
        denominator = torch.stack([side.inside.sum() for side in sides])
        # The bias of a class without a sample would fall for ever.
        unseen = torch.stack([~side.known & (self.rows.smoothing == 0) for side in sides])

        means = torch.stack([side.mean for side in sides])[:, None]

        def pull(at: Tensor) -> Tensor:
            """The gradient of the penalty: of weights and biases, and of the logits of the mean sample."""
            return strength * at + (at * means).sum(2, keepdim=True) / denominator[:, None, None] * means

        def look(at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            share((at, None))
            sums = self._gradient(at, sides)
            gradient = self._in_basis(sums, num, self.num_classes) / denominator[:, None, None] + pull(at)
            gradient[unseen] = 0.0
            curvature, losses = sums[-4 * num : -3 * num] / denominator / self.num_classes, sums[-3 * num :].view(num, 3)
            seen = at.masked_fill(unseen[:, :, None], 0.0)
            return losses[:, 0] / denominator + _dot(seen, pull(seen))[:, 0, 0] / 2, gradient, curvature, losses

        def product(direction: Tensor, at: Tensor) -> Tensor:
            share((at, direction))
            found = self._in_basis(self._product(direction, at, sides), num, self.num_classes) / denominator[:, None, None] + pull(direction)
            found[unseen] = 0.0
            return found

        variances = torch.cat([self.variances, torch.ones(1, dtype=torch.float64)])
        at = start.clone()
        at[unseen] = 0.0
        at[:, :, -1][unseen] = UNSEEN_BIAS
        value, gradient, curvature, losses = look(at)
        moves = torch.ones(num, dtype=torch.bool)
        fall = torch.full((num,), float("inf"), dtype=torch.float64)
        for _ in range(MAX_STEPS):
            diagonal = curvature[:, None, None] * variances + strength + means.square() / denominator[:, None, None]
            step = _conjugate_gradients(lambda direction, at=at: product(direction, at), gradient, diagonal, tolerance, moves[:, None, None])  # type: ignore[misc]
            slope = _dot(gradient, step)[:, 0, 0]
            fall = torch.where(moves, -slope / 2, fall)
            moves = moves & (fall > 0)
            if not moves.any():
                break
            size = moves.double()
            while True:
                tried = look(at + size[:, None, None] * step)
                good = (tried[0] <= value + 1e-4 * size * slope + least) | (size < 1e-6)
                if good.all():
                    break
                size = torch.where(good, size, size / 2)
            at, (value, gradient, curvature, losses) = at + size[:, None, None] * step, tried
            moves = moves & (fall > tolerance)
            if not moves.any():
                break
        share(None)
        found: Found = share(Found(at, losses, bool((fall <= tolerance).all())))
        return found

    def path(self, folds: Tensor, strengths: Sequence[float]) -> tuple[list[tuple[float, float]], Tensor]:
        """The strengths tried with their losses on held-out samples, and the mean of the folds' solutions at the best one.

        A class that a fold leaves no sample of to learn from is not asked about there.
        """
        sides = []
        for fold in range(int(folds.max()) + 1):
            side = self.side(self.rows.weights * (folds != fold))
            outside = self.rows.weights * (folds == fold) * side.known[self.rows.labels]
            if outside.any():
                sides.append(replace(side, outside=outside))
        tried: list[tuple[float, float]] = []
        if not sides:
            return tried, self.zeros()
        at_once = max(1, COLUMNS // self.num_classes)
        parts = [sides[first : first + at_once] for first in range(0, len(sides), at_once)]
        starts, before = [self.zeros(len(part)) for part in parts], list[Tensor]()
        outsides = [side.outside for side in sides if side.outside is not None]
        total, count = float(sum(outside.sum() for outside in outsides)), sum(int(outside.count_nonzero()) for outside in outsides)
        best, since, found = float("inf"), 0, self.zeros()
        self._compute_in(torch.float32)
        for strength in strengths:
            leads = [2 * one - earlier for one, earlier in zip(starts, before)] or starts
            parts_found = [self.minimise(part, strength, lead, tolerance=PATH_TOLERANCE) for part, lead in zip(parts, leads)]
            before, starts = starts if tried else [], [one.at for one in parts_found]
            _, held_out, of_any = (float(value) / total for value in reduce(torch.add, [one.losses.sum(0) for one in parts_found]))
            loss = self.team.share((held_out * count + of_any) / (count + 1))
            tried.append((strength, loss))
            since += 1
            if loss < best:
                best, since, found = loss, 0, reduce(torch.add, [one.sum(0, keepdim=True) for one in starts]) / len(sides)
            if since == PATIENCE:
                break
        self._compute_in(torch.float64)
        return tried, found
