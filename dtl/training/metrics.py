"""Metrics that are no means over images: averages over classes, and those of sorted scores. Exact at any number of ranks. N images, K classes, D draws.

As scikit-learn defines them: `balanced_accuracy` is the mean recall of the classes that have images, `macro_f1` the mean F1 of these, `auroc` the area
under the ROC curve and `average_precision` the step-wise sum over the precision-recall curve; with two classes of the second one's probability, with
more the mean over classes of one against the rest. Probabilities are float32; equal ones count as ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.config.models import RECALL_OF
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.intervals import Array, Bootstrap, Interval
from dtl.text import nearest
from dtl.training.evaluate import Outputs, first_greatest
from dtl.training.phases import Phase

Ints = npt.NDArray[np.int64]
_ON_DEVICE = 1 << 22  # probabilities that wait on the device
_GATHERED = 1 << 24  # probabilities gathered at a time: 64 MiB


# ---- averages over classes


def macro(hits: Ints, support: Ints, predicted: Ints) -> tuple[Array, Array]:
    """(balanced accuracy, macro F1) of counts [..., K]; NaN without images."""
    has = support > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, f1 = np.where(has, hits / support, 0.0), np.where(has, 2 * hits / (support + predicted), 0.0)
        num = has.sum(axis=-1)
        return np.asarray(recall.sum(axis=-1) / num), np.asarray(f1.sum(axis=-1) / num)


def class_counts(counts: Ints, labels: Ints, predicted: Ints, num_classes: int) -> tuple[Ints, Ints, Ints]:
    """Hits, support and predictions by class, each [D, K], of images that are in a draw so often: `counts` [D, N]."""
    right = np.where(labels == predicted, counts, 0)
    return _by_class(right, labels, num_classes), _by_class(counts, labels, num_classes), _by_class(counts, predicted, num_classes)


def _by_class(counts: Ints, classes: Ints, num_classes: int) -> Ints:
    total = np.zeros((len(counts), num_classes), np.int64)
    if len(classes):
        order = np.argsort(classes, kind="stable")
        found, starts = np.unique(classes[order], return_index=True)
        total[:, found] = np.add.reduceat(counts[:, order], starts, axis=1)
    return total


def macro_intervals(labels: Ints, predicted: Ints, num_classes: int, bootstrap: Bootstrap) -> tuple[Interval | None, Interval | None]:
    """Of balanced accuracy and macro F1."""
    if not len(labels):
        return None, None
    values = macro(*(one[0] for one in class_counts(np.ones((1, len(labels)), np.int64), labels, predicted, num_classes)))
    least = _harmonic(np.bincount(labels, minlength=num_classes))
    found = []
    for place, value in enumerate(values):
        variance = bootstrap.variance(lambda counts, place=place: macro(*class_counts(counts, labels, predicted, num_classes))[place])  # type: ignore[misc]
        found.append(bootstrap.interval(float(value), variance, least=least))
    return found[0], found[1]


def _harmonic(support: Ints) -> float:
    """On how many images a mean over classes stands: as many as would have its variance, were all classes recognised equally well."""
    support = support[support > 0]
    return float(len(support) ** 2 / (1 / support).sum())


# ---- sorted scores


def auroc(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating[Any]], counts: Ints | None = None) -> Array:
    """Of images that are in a draw so often (`counts` [D, N]; by default one draw, each once), [D]: integers until the division. NaN without a positive
    or without a negative image."""
    ups, downs = _tied(positive, scores, counts)
    below = np.cumsum(downs, axis=1) - downs
    pairs = ups.sum(axis=1) * downs.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((ups * (2 * below + downs)).sum(axis=1) / (2 * pairs))


def average_precision(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating[Any]], counts: Ints | None = None) -> Array:
    """The same of average precision."""
    ups, downs = (column[:, ::-1] for column in _tied(positive, scores, counts))
    found, seen = np.cumsum(ups, axis=1), np.cumsum(ups + downs, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, found / np.maximum(seen, 1), 0.0)
        value = np.asarray((ups * precision).sum(axis=1) / ups.sum(axis=1))
    return np.where(downs.sum(axis=1) > 0, value, np.nan)


RANKED: dict[str, Callable[..., Array]] = {"auroc": auroc, "average_precision": average_precision}


def _tied(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating[Any]], counts: Ints | None) -> tuple[Ints, Ints]:
    """Positive and negative images at each score that occurs, lowest first: [D, scores]."""
    if counts is None:
        counts = np.ones((1, len(scores)), np.int64)
    if not len(scores) or np.isnan(scores).any():  # no order: not a number, which no weights are kept for
        return np.zeros((len(counts), 1), np.int64), np.zeros((len(counts), 1), np.int64)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    sorted_counts, up = counts[:, order], positive[order]
    ups = np.add.reduceat(np.where(up, sorted_counts, 0), starts, axis=1)
    return ups, np.add.reduceat(sorted_counts, starts, axis=1) - ups


class Scores:
    """The probabilities of this rank's images, 4 K bytes of host memory for each; nothing in `add` waits for the device but now and then."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._waiting = 0

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor, samples: Tensor) -> None:
        """A batch: logits [B, K], labels and sample numbers int64 [B]; what has weight 0 counts nowhere."""
        numbers = torch.stack([samples.to(labels.device, copy=True), labels, (weights > 0).long()], dim=1)
        probabilities = logits.softmax(dim=1)
        self._parts.append((numbers, probabilities[:, 1:] if self.num_classes == 2 else probabilities))
        self._waiting += probabilities.numel()
        if self._waiting > _ON_DEVICE:
            self._to_host()

    def _to_host(self) -> None:
        self._parts, self._waiting = [(numbers.cpu(), values.cpu()) for numbers, values in self._parts], 0

    def all_ranks(self, runtime: Runtime) -> Ranking:
        """Every rank must call it."""
        self._to_host()
        columns = 1 if self.num_classes == 2 else self.num_classes
        numbers = torch.cat([torch.empty(0, 3, dtype=torch.int64), *(one for one, _ in self._parts)])
        values = torch.cat([torch.empty(0, columns), *(one for _, one in self._parts)])
        real = numbers[:, 2] > 0
        numbers, values = numbers[real], values[real]
        self._parts = []
        most = max(runtime.gather(len(numbers)))
        padded = torch.cat([numbers, numbers.new_zeros(most - len(numbers), 3)])
        everyone = torch.cat(runtime.gather_rows(padded)).numpy()
        return Ranking(self.num_classes, everyone, torch.cat([values, values.new_zeros(most - len(values), columns)]), runtime)


@dataclass(frozen=True)
class Ranking:
    """The images of all ranks by their probabilities. Every rank must ask for the same, at the same time: classes are gathered some at a time, which
    takes 64 MiB, or 4 N bytes where that is more."""

    num_classes: int
    _numbers: Ints
    """[ranks x most, 3]: sample, label, whether there is one."""
    _values: Tensor
    """This rank's, [most, K], or [most, 1] with two classes."""
    runtime: Runtime

    @classmethod
    def joined(cls, parts: Sequence[tuple[Ranking, Ints]]) -> Ranking:
        """Of several sets of images together, each in one process, and the number that each of its samples has among all of them."""
        numbers = [np.column_stack([where[one._numbers[:, 0]], one._numbers[:, 1:]]) for one, where in parts]
        first = parts[0][0]
        return cls(first.num_classes, np.concatenate(numbers), torch.cat([one._values for one, _ in parts]), first.runtime)

    def _order(self) -> Ints:
        real = np.flatnonzero(self._numbers[:, 2])
        return np.asarray(real[np.lexsort((self._numbers[real, 1], self._numbers[real, 0]))], np.int64)

    def columns(self) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]]:
        """Of each class with positive and negative images (of two classes the second): which images are of it, and their probabilities. In the order
        of sample numbers."""
        order = self._order()
        labels = self._numbers[order, 1]
        width = self._values.shape[1]
        at_once = max(1, _GATHERED // max(1, len(self._numbers)))
        for first in range(0, width, at_once):
            block = torch.cat(self.runtime.gather_rows(self._values[:, first : first + at_once].contiguous())).numpy()[order]
            for place in range(block.shape[1]):
                positive = labels == (1 if self.num_classes == 2 else first + place)
                if positive.any() and not positive.all():
                    yield positive, block[:, place]

    def value(self, metric: str) -> float:
        """`auroc` or `average_precision`; NaN where no class has images and others have too."""
        values = [float(RANKED[metric](positive, scores)[0]) for positive, scores in self.columns()]
        return math.fsum(values) / len(values) if values else math.nan

    def with_intervals(self, bootstrap: Bootstrap) -> dict[str, tuple[float | None, Interval | None]]:
        """Both metrics, each with its interval; None for what is not known, or would take too long."""
        draws = bootstrap.num_draws(per_image=self._values.shape[1])
        totals = {metric: np.zeros(draws) for metric in RANKED}
        numbers = {metric: np.zeros(draws) for metric in RANKED}
        points: dict[str, list[float]] = {metric: [] for metric in RANKED}
        for positive, scores in self.columns():
            values: dict[str, list[Array]] = {metric: [] for metric in RANKED}
            for counts in bootstrap.counts(draws):
                for metric, compute in RANKED.items():
                    values[metric].append(compute(positive, scores, counts))
            for metric, compute in RANKED.items():
                points[metric].append(float(compute(positive, scores)[0]))
                if draws:
                    drawn = np.concatenate(values[metric])
                    totals[metric] += np.nan_to_num(drawn)
                    numbers[metric] += np.isfinite(drawn)
        found: dict[str, tuple[float | None, Interval | None]] = {}
        support = np.bincount(self._numbers[self._numbers[:, 2] > 0, 1], minlength=self.num_classes)
        for metric in RANKED:
            value = math.fsum(points[metric]) / len(points[metric]) if points[metric] else math.nan
            drawn = totals[metric][numbers[metric] > 0] / numbers[metric][numbers[metric] > 0]
            variance = float(drawn.var(ddof=1)) if len(drawn) > 1 else None
            known = value if math.isfinite(value) else None
            found[metric] = (known, bootstrap.interval(known, variance, least=_harmonic(support) if support.any() else None))
        return found


# ---- what a run chooses its weights by


class Monitored:
    """The monitored metric of one evaluation: this rank's part, until `value` adds up all ranks."""

    def __init__(self, name: str, classes: Sequence[str], device: torch.device) -> None:
        self.name, self._classes = name, list(classes)
        self._scores = Scores(len(classes)) if name in RANKED else None
        self._counts = torch.zeros(3, len(classes), dtype=torch.int64, device=device)  # hits, support, predictions

    def add(self, outputs: Outputs, losses: Tensor) -> None:
        """A batch. Nothing waits for the device, but for `Scores` now and then."""
        logits, labels, weights = outputs.logits, outputs.labels, outputs.weights
        if self._scores is not None:
            samples = outputs.batch.samples.repeat(len(labels) // len(outputs.batch.samples))
            self._scores.add(logits, labels, weights, samples)
            return
        real, predicted = (weights > 0).long(), first_greatest(logits)
        right = real * (predicted == labels) * ~logits.isnan().any(dim=1)
        for row, (classes, counts) in zip(self._counts, ((labels, right), (labels, real), (predicted, real))):
            row.index_add_(0, classes, counts)

    def value(self, runtime: Runtime) -> float:
        """Every rank must call it, and all get the same."""
        if self._scores is not None:
            return self._scores.all_ranks(runtime).value(self.name)
        hits, support, predicted = runtime.sum(self._counts.cpu()).numpy()
        if self.name.startswith(RECALL_OF):
            label = self._classes.index(self.name.removeprefix(RECALL_OF))
            return float(hits[label] / support[label]) if support[label] else math.nan
        balanced, f1 = macro(hits, support, predicted)
        return float({"balanced_accuracy": balanced, "macro_f1": f1}[self.name])


def monitored_in(phase: Phase, monitor: str) -> str:
    """What a phase is judged by: the recall of a class of the data means nothing to a pretext task, which goes by top1."""
    return "top1" if monitor.startswith(RECALL_OF) and phase.task.name != "classify" else monitor


def check_monitor(monitor: str, classes: Sequence[str], num_val: Sequence[int]) -> None:
    """UserError where no validation images can give the metric, or `recall:CLASS` names no class. `num_val`: validation images of each class."""
    if monitor in RANKED and np.count_nonzero(num_val) < 2:
        raise UserError(f"checkpoint.monitor is {monitor}, but all validation images are of one class; use top1")
    if not monitor.startswith(RECALL_OF):
        return
    name = monitor.removeprefix(RECALL_OF)
    if name not in classes:
        raise UserError(f"checkpoint.monitor is {monitor}, but there is no class {name!r}{nearest(name, classes)}")
    if not num_val[list(classes).index(name)]:
        raise UserError(f"checkpoint.monitor is {monitor}, but no validation image is of the class {name!r}")
