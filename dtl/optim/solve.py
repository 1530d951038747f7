"""Multinomial logistic regression on features, solved by Newton's method: what SGD on a linear head goes towards, reached and not approached.

N samples with D features, K classes. Minimised over the weights W [K,D] and biases b [K] of a linear layer on standardised features z:

    sum_i w_i * cross_entropy(W z_i + b, y_i) / sum_i w_i  +  strength / 2 * |W|^2

w_i is the weight of sample i (its class weight; 0 for a damaged one). z has mean 0 and variance 1 over the samples that count; W and b are given for the
features as they are. Biases are not penalised. This is scikit-learn's LogisticRegression with C = 1 / (strength * sum_i w_i) (Pedregosa et al., JMLR 12,
2011). Each Newton step is found by conjugate gradients (Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.1), whose products with the Hessian
are passes over the rows. They are taken in the basis of the features' principal components: there the Hessian is near a diagonal one, the components'
variances times the mean of p (1 - p), plus the strength, which is the preconditioner. Fewer samples than features have no more components than samples, so
that all passes are over [N,N]. All arithmetic is float64 on the CPU, in blocks of rows, so that memory does not grow with N.

The strength is the one with the lowest cross-entropy on samples that were held out, of a path from strong to weak in which each solution starts at the one
before. Each fold is held out once; of many samples one fold is enough.

Sums are taken over up to LANES parts of the rows, always the same ones, by one thread each, and added in the order of the parts: any number of processes and
of threads gives the same bits. The first process alone takes the optimizer's decisions, and finds the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
PATIENCE = 3
"""Strengths in sequence that are no better than the best before them end a path."""
TOLERANCE, PATH_TOLERANCE = 1e-16, 1e-4
"""The step by which the objective would fall by less is the last one, at the solution and at those of the folds. Steps converge quadratically: what is left
after it is far smaller."""
LEAST_CHANGE = 1e-13
"""Smaller changes of the objective are its rounding."""
UNSEEN_BIAS = -30.0
"""Of a class that no sample has; the others' biases have mean 0."""
MAX_STEPS, MAX_PRODUCTS = 100, 200
"""Newton steps, and products with the Hessian in each."""
MOST_COMPONENTS = 2048
"""More are not looked for; the features are then taken as they are."""
KEPT = 1 << 25
"""Features up to this number (256 MiB) stay in memory, standardised."""
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
    """float32 [K,D], for features as they are (the standardisation is folded in)."""
    bias: Tensor
    """float32 [K]."""
    strength: float
    path: tuple[tuple[float, float], ...]
    """Strengths tried with the cross-entropy on held-out samples; empty where one strength was given."""
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
    lanes = _num_lanes(num_samples)
    layers = 2 * lanes + FOLDS + 16
    basis = 3 * min(num_features, MOST_COMPONENTS) * num_features
    kept = min(num_samples * num_features, KEPT) if num_samples * num_features <= KEPT else 0
    return 8 * (layers * num_classes * (num_features + 1) + lanes * BLOCK * (2 * num_features + 4 * num_classes) + basis + 2 * kept + 6 * num_samples)


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
        found, converged = problem.minimise(rows.weights, strength, start, tolerance=TOLERANCE)
        loss = problem.total(found, rows.weights) / float(rows.weights.sum())
        weight = (found[:, :-1] if problem.basis is None else found[:, :-1] @ problem.basis.T) / problem.scale
        bias = found[:, -1] - weight @ problem.mean
        return Solution(weight.float(), bias.float(), strength, tuple(path), loss, problem.passes, converged)
    finally:
        problem.close()


def _conjugate_gradients(product: Callable[[Tensor], Tensor], gradient: Tensor, diagonal: Tensor, enough: float) -> Tensor:
    """The Newton step, as exactly as it is worth: Hessian times step = -gradient. `diagonal`: near the Hessian's."""
    step, rest = torch.zeros_like(gradient), -gradient
    direction = rest / diagonal
    left = first = float((rest * direction).sum())
    for _ in range(MAX_PRODUCTS):
        if left <= max(first * min(0.0625, first), enough):
            break
        curved = product(direction)
        length = left / float((direction * curved).sum())
        step += length * direction
        rest -= length * curved
        scaled = rest / diagonal
        before, left = left, float((rest * scaled).sum())
        direction = scaled + left / before * direction
    return step


class _Problem:
    def __init__(self, rows: Rows, num_classes: int, team: Team) -> None:
        self.rows, self.num_classes, self.team = rows, num_classes, team
        num_samples, self.num_features = rows.features.shape
        self.num_lanes = _num_lanes(num_samples)
        edges = [lane * num_samples // self.num_lanes for lane in range(self.num_lanes + 1)]
        self.lanes = [(edges[lane], edges[lane + 1]) for lane in range(team.rank, self.num_lanes, team.ranks)]
        self._kept: dict[int, Tensor] | None = {} if num_samples * self.num_features <= KEPT else None
        self._probabilities: dict[int, Tensor] | None = {} if num_samples * num_classes <= KEPT else None
        """Of the gradient before, by the first row of each block."""
        self.basis: Tensor | None = None
        self._turned = False
        self.passes = 0
        self._pool = ThreadPoolExecutor(max(1, team.threads))
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a product split among threads adds in another order
        self.mean, self.scale = torch.zeros(self.num_features, dtype=torch.float64), torch.ones(self.num_features, dtype=torch.float64)
        used = (rows.weights > 0).double()
        size = self.num_features
        count = float(used.sum())
        mean = self.sums(lambda x, part: used[part] @ x, size, standardised=False) / count
        squares = self.sums(lambda x, part: used[part] @ (x - mean).square_(), size, standardised=False)
        deviation = (squares / count).sqrt()
        # A feature that is constant stays so, whatever rounding makes of it.
        self.mean, self.scale = mean, torch.where(deviation > 1e-7 * mean.abs().clamp_min(1e-30), deviation, torch.ones_like(deviation))
        self.basis, self.variances = team.share(None if team.rank else self._components())
        if self.basis is not None and num_samples < self.num_features:
            self._kept, self._turned, self.num_features = {}, True, len(self.variances)

    def _components(self) -> tuple[Tensor | None, Tensor]:
        """[D,P] and [P]: the principal components of the features, and their variances. Of many rows some thousands say enough: they only make it fast."""
        num_samples, size = len(self.rows.labels), self.num_features
        if min(num_samples, size) > MOST_COMPONENTS:
            return None, torch.ones(size, dtype=torch.float64)
        stride = max(1, num_samples // (2 * MOST_COMPONENTS))
        x = torch.cat([self._block(slice(start, min(start + BLOCK * stride, num_samples), stride), True) for start in range(0, num_samples, BLOCK * stride)])
        if num_samples < size:
            values, vectors = torch.linalg.eigh(x @ x.T)
            real = values > values[-1].clamp_min(1e-300) * 1e-12
            return x.T @ vectors[:, real] / values[real].sqrt(), values[real] / len(x)
        values, vectors = torch.linalg.eigh(x.T @ x)
        return vectors, values.clamp_min(0) / len(x)

    def close(self) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)

    def zeros(self) -> Tensor:
        return torch.zeros(self.num_classes, len(self.variances) + 1, dtype=torch.float64)

    def _block(self, part: slice, standardised: bool) -> Tensor:
        kept = None if self._kept is None or not standardised else self._kept.get(part.start)
        if kept is not None:
            return kept
        # In torch's own memory: a product's last bits may depend on where in memory its rows begin.
        x = torch.empty(len(range(part.start, part.stop, part.step or 1)), self.rows.features.shape[1], dtype=torch.float64)
        np.copyto(x.numpy(), self.rows.features[part])
        if standardised:
            x.sub_(self.mean).div_(self.scale)
            if self._turned:
                assert self.basis is not None
                x = x @ self.basis
            if self._kept is not None and part.step is None:
                self._kept[part.start] = x
        return x

    def _weights(self, at: Tensor) -> Tensor:
        """[K, D]: the weights of the features as the blocks have them."""
        return at[:, :-1] if self.basis is None or self._turned else at[:, :-1] @ self.basis.T

    def _in_basis(self, sums: Tensor) -> Tensor:
        """[K, P + 1] of the sums [K * D + K] by weights and biases."""
        size = self.num_classes * self.num_features
        by_weight = sums[:size].view(self.num_classes, -1)
        return torch.cat([by_weight if self.basis is None or self._turned else by_weight @ self.basis, sums[size : size + self.num_classes, None]], dim=1)

    def sums(self, of: Callable[[Tensor, slice], Tensor], size: int, *, standardised: bool = True) -> Tensor:
        """[size]: the sum of of(features of some rows, which rows) over all rows of all processes."""

        def lane(edges: tuple[int, int]) -> Tensor:
            total = torch.zeros(size, dtype=torch.float64)
            for start in range(edges[0], edges[1], BLOCK):
                part = slice(start, min(start + BLOCK, edges[1]))
                total += of(self._block(part, standardised), part)
            return total

        everyones = torch.zeros(self.num_lanes, size, dtype=torch.float64)
        for number, value in enumerate(self._pool.map(lane, self.lanes)):
            everyones[self.team.rank + number * self.team.ranks] += value  # 0 + -0 is 0, as in the sum over processes
        everyones = self.team.add(everyones)
        self.passes += 1
        if self.team.stop():
            raise Interrupted
        return reduce(torch.add, everyones.unbind())

    def total(self, at: Tensor, weights: Tensor) -> float:
        """The weighted sum of the cross-entropy."""

        w = self._weights(at)

        def losses(x: Tensor, part: slice) -> Tensor:
            used = weights[part].nonzero()[:, 0]
            logits = x[used] @ w.T + at[:, -1]
            each = cross_entropy(logits, self.rows.labels[part][used], reduction="none", label_smoothing=self.rows.smoothing)
            return (each * weights[part][used]).sum()[None]

        return float(self.team.share(float(self.sums(losses, 1)[0])))

    def _gradient(self, at: Tensor, weights: Tensor) -> Tensor:
        """[K * D + K + 2]: the sums of the gradients by W and by b, of the losses, and of p (1 - p)."""
        w, b, smoothing = self._weights(at), at[:, -1], self.rows.smoothing

        def gradient(x: Tensor, part: slice) -> Tensor:
            labels, weight = self.rows.labels[part], weights[part]
            logs = torch.log_softmax(x @ w.T + b, dim=1)
            losses = -(1 - smoothing) * logs.gather(1, labels[:, None])[:, 0] - smoothing * logs.mean(dim=1)
            error = logs.exp_()
            if self._probabilities is not None:
                self._probabilities[part.start] = error.clone()
            curvature = (weight * (1 - error.square().sum(1))).sum()
            error -= smoothing / self.num_classes
            error[torch.arange(len(labels)), labels] -= 1 - smoothing
            error *= weight[:, None]
            return torch.cat([(error.T @ x).flatten(), error.sum(0), (losses * weight).sum()[None], curvature[None]])

        return self.sums(gradient, self.num_classes * (self.num_features + 1) + 2)

    def _product(self, direction: Tensor, at: Tensor, weights: Tensor) -> Tensor:
        """[K * D + K]: the sums of the Hessians at `at`, where the last gradient was taken, times a direction."""
        w, b, v, c = self._weights(at), at[:, -1], self._weights(direction), direction[:, -1]

        def product(x: Tensor, part: slice) -> Tensor:
            p = torch.softmax(x @ w.T + b, dim=1) if self._probabilities is None else self._probabilities[part.start]
            change = (x @ v.T + c).mul_(p)
            change -= p * change.sum(1, keepdim=True)
            change *= weights[part][:, None]
            return torch.cat([(change.T @ x).flatten(), change.sum(0)])

        return self.sums(product, self.num_classes * (self.num_features + 1))

    def minimise(self, weights: Tensor, strength: float, start: Tensor, *, tolerance: float) -> tuple[Tensor, bool]:
        """The solution for samples of these weights, and whether it was reached."""
        share = self.team.share
        if self.team.rank:  # the first process says which sums are wanted, and where
            while (wanted := share(None)) is not None:
                at, direction = wanted
                self._gradient(at, weights) if direction is None else self._product(direction, at, weights)
            found: tuple[Tensor, bool] = share(None)
            return found
        denominator = float(weights.sum())
        # The bias of a class without a sample would fall for ever.
        unseen = torch.bincount(self.rows.labels, weights=weights, minlength=self.num_classes) == (0 if self.rows.smoothing == 0 else -1)
        penalty = torch.full((len(self.variances) + 1,), strength, dtype=torch.float64)
        penalty[-1] = 0.0

        def look(at: Tensor) -> tuple[float, Tensor, Tensor]:
            share((at, None))
            sums = self._gradient(at, weights) / denominator
            gradient = self._in_basis(sums) + penalty * at
            gradient[unseen] = 0.0
            return float(sums[-2] + strength / 2 * at[:, :-1].square().sum()), gradient, sums[-1] / self.num_classes

        def product(direction: Tensor, at: Tensor) -> Tensor:
            share((at, direction))
            found = self._in_basis(self._product(direction, at, weights) / denominator) + penalty * direction
            found[unseen] = 0.0
            return found

        at = start.clone()
        at[unseen], at[unseen, -1] = 0.0, UNSEEN_BIAS
        value, gradient, curvature = look(at)
        fall = float("inf")
        for _ in range(MAX_STEPS):
            diagonal = torch.cat([curvature * self.variances + strength, curvature[None] + 1e-12])
            step = _conjugate_gradients(lambda direction, at=at: product(direction, at), gradient, diagonal, tolerance)  # type: ignore[misc]
            slope, size = float((gradient * step).sum()), 1.0
            fall = -slope / 2
            if fall <= 0:
                break
            while True:
                tried = look(at + size * step)
                if tried[0] <= value + 1e-4 * size * slope + LEAST_CHANGE or size < 1e-6:
                    break
                size /= 2
            at, (value, gradient, curvature) = at + size * step, tried
            if fall <= tolerance:
                break
        share(None)
        return share((at, fall <= tolerance))  # type: ignore[no-any-return]

    def path(self, folds: Tensor, strengths: Sequence[float]) -> tuple[list[tuple[float, float]], Tensor]:
        """The strengths tried with their losses on held-out samples, and the mean of the folds' solutions at the best one.

        A class that a fold leaves no sample of to learn from is not asked about there.
        """
        sides, starts = [], []
        for fold in range(int(folds.max()) + 1):
            inside, outside = self.rows.weights * (folds != fold), self.rows.weights * (folds == fold)
            known = torch.bincount(self.rows.labels, weights=inside, minlength=self.num_classes) > 0
            outside = outside * known[self.rows.labels]
            if outside.any():
                sides.append((inside, outside))
                starts.append(self.zeros())
        tried: list[tuple[float, float]] = []
        best, since, found = float("inf"), 0, self.zeros()
        total = float(sum(float(outside.sum()) for _, outside in sides))
        for strength in strengths if sides else ():
            held_out = 0.0
            for number, (inside, outside) in enumerate(sides):
                starts[number], _ = self.minimise(inside, strength, starts[number], tolerance=PATH_TOLERANCE)
                held_out += self.total(starts[number], outside)
            loss = self.team.share(held_out / total)
            tried.append((strength, loss))
            since += 1
            if loss < best:
                best, since, found = loss, 0, reduce(torch.add, starts) / len(starts)
            if since == PATIENCE:
                break
        return tried, found
