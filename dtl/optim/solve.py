"""Multinomial logistic regression on features, solved by L-BFGS: what SGD on a linear head goes towards, reached and not approached.

N samples with D features, K classes. Minimised over the weights W [K,D] and biases b [K] of a linear layer on standardised features z:

    sum_i w_i * cross_entropy(W z_i + b, y_i) / sum_i w_i  +  strength / 2 * |W|^2

w_i is the weight of sample i (its class weight; 0 for a damaged one). z has mean 0 and variance 1 over the samples that count; W and b are given for the
features as they are. Biases are not penalised. This is scikit-learn's LogisticRegression with C = 1 / (strength * sum_i w_i) (Pedregosa et al., JMLR 12,
2011); the optimizer is torch.optim.LBFGS with the strong Wolfe conditions (Nocedal and Wright, Numerical Optimization, 2006, algorithms 3.5 and 7.5). All
arithmetic is float64 on the CPU, in blocks of rows, so that memory does not grow with N.

The strength is the one with the lowest cross-entropy on samples that were held out, of a path from strong to weak in which each solution starts at the one
before. Each fold is held out once; of many samples one fold is enough.

Sums are taken over up to LANES parts of the rows, always the same ones, by one thread each, and added in the order of the parts: any number of processes and
of threads gives the same bits. The first process alone takes the optimizer's decisions.
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
TOLERANCE, PATH_TOLERANCE = 1e-6, 1e-4
"""Largest entry of the gradient at the solution, and at those of the folds. Steps also end where the objective changes by less than LEAST_CHANGE, which is
its rounding."""
LEAST_CHANGE, CONVERGED = 1e-15, 1e-5
"""CONVERGED: a larger gradient at the end is reported."""
UNSEEN_BIAS = -30.0
"""Of a class that no sample has; the others' biases have mean 0."""
MAX_STEPS = 1000
HISTORY = 10
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
    layers = 2 * HISTORY + 4 * lanes + FOLDS + 12
    kept = min(num_samples * num_features, KEPT) if num_samples * num_features <= KEPT else 0
    return 8 * (layers * num_classes * (num_features + 1) + lanes * BLOCK * (2 * num_features + 4 * num_classes) + kept + 6 * num_samples)


def _num_lanes(num_samples: int) -> int:
    return max(1, min(LANES, num_samples // BLOCK))


def solve(
    rows: Rows,
    *,
    num_classes: int,
    folds: np.ndarray | None,
    strengths: Sequence[float] = STRENGTHS,
    team: Team | None = None,
    tolerance: float = TOLERANCE,
) -> Solution:
    """`folds`: see `deal`; None, or a single one of `strengths`: nothing is held out. Interrupted on all processes where the team stops."""
    problem = _Problem(rows, num_classes, team or Team())
    try:
        path: list[tuple[float, float]] = []
        strength, start = strengths[0] if len(strengths) == 1 else USUAL_STRENGTH, problem.zeros()
        if len(strengths) > 1 and folds is not None:
            path, start = problem.path(torch.from_numpy(folds), strengths)
            strength = min(path, key=lambda tried: tried[1])[0] if path else strength
        found, converged = problem.minimise(rows.weights, strength, start, tolerance=tolerance)
        loss = problem.total(found, rows.weights) / float(rows.weights.sum())
        weight = found[:, :-1] / problem.scale
        bias = found[:, -1] - weight @ problem.mean
        return Solution(weight.float(), bias.float(), strength, tuple(path), loss, problem.passes, converged)
    finally:
        problem.close()


class _Problem:
    def __init__(self, rows: Rows, num_classes: int, team: Team) -> None:
        self.rows, self.num_classes, self.team = rows, num_classes, team
        num_samples, self.num_features = rows.features.shape
        self.num_lanes = _num_lanes(num_samples)
        edges = [lane * num_samples // self.num_lanes for lane in range(self.num_lanes + 1)]
        self.lanes = [(edges[lane], edges[lane + 1]) for lane in range(team.rank, self.num_lanes, team.ranks)]
        self._kept: dict[int, Tensor] | None = {} if num_samples * self.num_features <= KEPT else None
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

    def close(self) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)

    def zeros(self) -> Tensor:
        return torch.zeros(self.num_classes, self.num_features + 1, dtype=torch.float64)

    def _block(self, part: slice, standardised: bool) -> Tensor:
        kept = None if self._kept is None or not standardised else self._kept.get(part.start)
        if kept is not None:
            return kept
        # In torch's own memory: a product's last bits may depend on where in memory its rows begin.
        x = torch.empty(part.stop - part.start, self.num_features, dtype=torch.float64)
        np.copyto(x.numpy(), self.rows.features[part])
        if standardised:
            x.sub_(self.mean).div_(self.scale)
            if self._kept is not None:
                self._kept[part.start] = x
        return x

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

        def losses(x: Tensor, part: slice) -> Tensor:
            used = weights[part].nonzero()[:, 0]
            logits = x[used] @ at[:, :-1].T + at[:, -1]
            each = cross_entropy(logits, self.rows.labels[part][used], reduction="none", label_smoothing=self.rows.smoothing)
            return (each * weights[part][used]).sum()[None]

        return float(self.team.share(float(self.sums(losses, 1)[0])))

    def _gradient(self, at: Tensor, weights: Tensor) -> Tensor:
        """[K * D + K + 1]: the sums of the gradients by W and by b, and of the losses."""
        w, b, smoothing = at[:, :-1], at[:, -1], self.rows.smoothing

        def gradient(x: Tensor, part: slice) -> Tensor:
            labels, weight = self.rows.labels[part], weights[part]
            logs = torch.log_softmax(x @ w.T + b, dim=1)
            losses = -(1 - smoothing) * logs.gather(1, labels[:, None])[:, 0] - smoothing * logs.mean(dim=1)
            error = logs.exp_()
            error -= smoothing / self.num_classes
            error[torch.arange(len(labels)), labels] -= 1 - smoothing
            error *= weight[:, None]
            return torch.cat([(error.T @ x).flatten(), error.sum(0), (losses * weight).sum()[None]])

        return self.sums(gradient, self.num_classes * (self.num_features + 1) + 1)

    def minimise(self, weights: Tensor, strength: float, start: Tensor, *, tolerance: float) -> tuple[Tensor, bool]:
        """The solution for samples of these weights, and whether its gradient is small."""
        share = self.team.share
        if self.team.rank:  # the first process says where the sums are wanted
            while (wanted := share(None)) is not None:
                self._gradient(wanted, weights)
            found: tuple[Tensor, bool] = share(None)
            return found
        denominator, size = weights.sum(), self.num_classes * self.num_features
        # The bias of a class without a sample would fall for ever.
        unseen = torch.bincount(self.rows.labels, weights=weights, minlength=self.num_classes) == (0 if self.rows.smoothing == 0 else -1)
        at = start.clone()
        at[unseen], at[unseen, -1] = 0.0, UNSEEN_BIAS
        at.requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [at], max_iter=MAX_STEPS, tolerance_grad=tolerance, tolerance_change=LEAST_CHANGE, history_size=HISTORY, line_search_fn="strong_wolfe"
        )

        @torch.no_grad()
        def closure() -> Tensor:
            sums = self._gradient(share(at.detach()), weights) / denominator
            w = at[:, :-1]
            at.grad = torch.cat([sums[:size].view(self.num_classes, -1) + strength * w, sums[size:-1, None]], dim=1)
            at.grad[unseen] = 0.0
            return sums[-1] + strength / 2 * w.square().sum()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        assert at.grad is not None
        share(None)
        return share((at.detach(), bool(at.grad.abs().max() <= max(CONVERGED, tolerance))))  # type: ignore[no-any-return]

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
