"""Which labels are probably wrong: confident learning on out-of-fold probabilities (Northcutt, Jiang and Chuang, JAIR 70, 2021), and how many to believe.

N images, D features, K classes. A linear classifier is fitted to the images outside of a fold and asked about those in it, so that no image is judged by a
classifier that has seen it, nor its twins (they are in one fold). Three times: the labels that confident learning doubts at first are not fitted to the
second time, and those that are suspected then not the third time.

An image is suspected by the probability of its own label. How low is low follows from the data: were labels drawn from the classifier's probabilities, E(t) of
them would have a probability of at most t. If O(t) have one in truth, a share E(t) / O(t) of these is there by chance, and the greatest t is taken for which
that is at most FALSE_SHARE. So a set without wrong labels gives none or few, and a hard set fewer than an easy one.
`cleanlab` does the first half of it; its rules to choose take the classifier's own confusions for errors: on the CIFAR-10 tenth with 10 % of the labels
flipped, half of what confident learning names is right as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtl import keyed

FOLDS = 5
FALSE_SHARE = 0.1
"""At most one in ten is to be right as it is; found true on the digits, ants and bees and the test images of CIFAR-10, with 10 % of the labels flipped."""
_STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)
_TEMPERATURES = np.linspace(0.2, 5, 97)
_STEPS = 100
_SPEED = 2e11  # operations a second of one thread, in products of large matrices

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Suspects:
    """Images whose label is probably wrong, the surest first."""

    rows: Ints
    given: npt.NDArray[np.float64]
    """The probability of the label that each has [n]."""
    suggested: Ints
    """The class with the highest probability [n]."""
    probability: npt.NDArray[np.float64]
    """Its probability [n]."""


def deal(groups: Ints, labels: Ints, folds: int) -> Ints:
    """The fold of each image [N]: whole groups, dealt class by class, in an order that does not depend on that of the images of a group."""
    codes, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = np.lexsort((keyed.keys(codes, "fold"), -sizes, labels[first]))
    found, total = np.zeros(len(codes), np.int64), np.zeros(folds, np.int64)
    for members in np.split(order, np.flatnonzero(np.diff(labels[first][order])) + 1):
        have = np.zeros(folds, np.int64)
        for one in members:
            found[one] = np.lexsort((total, have))[0]
            have[found[one]] += sizes[one]
            total[found[one]] += sizes[one]
    return np.asarray(found[np.searchsorted(codes, groups)])


def cost(number: int, width: int, classes: int) -> tuple[float, float]:
    """About how many seconds and bytes `find_suspects` takes for [number, width] features: an order of magnitude."""
    fits = FOLDS * (len(_STRENGTHS) + 2)
    operations = fits * number * (1 - 1 / FOLDS) * width * classes * 4 * _STEPS
    return operations / (_SPEED * torch.get_num_threads()), float(number * (classes * (4 * len(_STRENGTHS) + 4 * 8) + 2 * 4 * width))


def find_suspects(features: Any, labels: Ints, folds: Ints, num_classes: int) -> Suspects:
    """Of images with `features` [N,D], `labels` and `folds` [N]; each class has images in two folds or more."""
    everything = np.ones(len(labels), bool)
    tried = {strength: out_of_fold(features, labels, folds, num_classes, strength, everything) for strength in _STRENGTHS}
    strength = min(tried, key=lambda one: _loss(_calibrated(tried[one], labels, everything), labels))
    doubted = confident(_calibrated(tried[strength], labels, everything), labels)
    for _ in range(2):
        logits = out_of_fold(features, labels, folds, num_classes, strength, ~doubted)
        found = suspects(_calibrated(logits, labels, ~doubted), labels)
        doubted = np.zeros(len(labels), bool)
        doubted[found.rows] = True
    return found


def suspects(probabilities: npt.NDArray[np.float64], labels: Ints, false_share: float = FALSE_SHARE) -> Suspects:
    """From calibrated out-of-fold probabilities [N,K]."""
    number = len(labels)
    given = probabilities[np.arange(number), labels]
    order = np.argsort(given, kind="stable")
    every = np.sort(probabilities, axis=None)
    expected = np.concatenate([[0.0], np.cumsum(every)])[np.searchsorted(every, given[order], side="right")]
    good = np.flatnonzero(expected <= false_share * np.arange(1, number + 1))
    rows = order[: good[-1] + 1 if len(good) else 0]
    best = probabilities.argmax(1)
    rows = rows[best[rows] != labels[rows]]
    return Suspects(rows, given[rows], best[rows], probabilities[rows, best[rows]])


def confident(probabilities: npt.NDArray[np.float64], labels: Ints) -> npt.NDArray[np.bool_]:
    """Confident learning: images that reach another class's mean probability over the images labelled so, above all other classes that they reach."""
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    thresholds = np.where(counts > 0, np.bincount(labels, own, minlength=classes) / np.maximum(counts, 1), np.inf)
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    return np.asarray((reached.max(1) > 0) & (reached.argmax(1) != labels))


def out_of_fold(features: Any, labels: Ints, folds: Ints, num_classes: int, strength: float, fitted: npt.NDArray[np.bool_]) -> Floats:
    """Logits [N,K] by linear classifiers that were fitted without the image's fold, to the images `fitted` [N]."""
    logits = np.zeros((len(labels), num_classes), np.float32)
    for fold in np.unique(folds):
        inside, outside = np.flatnonzero((folds != fold) & fitted), np.flatnonzero(folds == fold)
        rows = torch.from_numpy(np.asarray(features[inside], np.float32))
        mean, scale = rows.mean(0), rows.std(0)
        scale = torch.where(scale > 1e-6, scale, torch.ones(()))
        weight = _fit((rows - mean) / scale, torch.from_numpy(labels[inside]), num_classes, strength)
        others = (torch.from_numpy(np.asarray(features[outside], np.float32)) - mean) / scale
        logits[outside] = (others @ weight[:, :-1].T + weight[:, -1]).numpy()
    return logits


def _fit(rows: torch.Tensor, labels: torch.Tensor, num_classes: int, strength: float) -> torch.Tensor:
    """[K,D+1]: mean cross-entropy + strength/2 |W|^2 near its minimum. `dtl.optim.solve` goes on to the last bits, which takes several times as long."""
    weight = torch.zeros(num_classes, rows.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(rows @ weight[:, :-1].T + weight[:, -1], labels) + strength / 2 * weight[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()


def _calibrated(logits: Floats, labels: Ints, by: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Probabilities at the temperature that suits these labels best."""
    wide = logits.astype(np.float64)
    best = min(_TEMPERATURES, key=lambda one: _loss(_softmax(wide[by] / one), labels[by]))
    return _softmax(wide / best)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    found = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(found / found.sum(1, keepdims=True))


def _loss(probabilities: npt.NDArray[np.float64], labels: Ints) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels] + 1e-12).mean())
