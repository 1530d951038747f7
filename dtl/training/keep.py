"""Which weights a phase keeps: the one-standard-error rule (Breiman et al. 1984), from what evaluations found for each image. N rows, C columns, D draws.

The metric alone chooses by two or three images of a small validation set. So weights whose metric is within one standard error of the best count as equally
good, and among these the validation loss decides, which sees each image's probability. The standard error is that of the difference of the two metrics on
the same images; images of one group, and the four rotations of one image, are one draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.config.models import RECALL_OF
from dtl.distributed.runtime import Runtime
from dtl.intervals import MOST_VALUES, Array, Bootstrap
from dtl.training.evaluate import Outputs, first_greatest, ranks_of_labels, rows_of_all_ranks
from dtl.training.metrics import RANKED, class_counts, macro

Ints = npt.NDArray[np.int64]
_MACRO = ("balanced_accuracy", "macro_f1")

# ---- the rule


class Candidate(Protocol):
    """An evaluation: `value` of the metric, greater is better, and the mean validation loss. Both may be NaN."""

    @property
    def value(self) -> float: ...

    @property
    def loss(self) -> float: ...


T = TypeVar("T", bound=Candidate)


def choose(new: T, kept: T | None, best: T | None, error: Callable[[T, T], float]) -> tuple[T, T]:
    """(kept, best) after the evaluation `new`. `error`: the standard error of the difference of two candidates' metrics.

    `new` is kept if what was kept is now more than one standard error below the best, or if `new` is within one of it and has the lower loss.
    """
    if best is None or _order(new) > _order(best):
        best = new
    if kept is None:
        return new, best
    gains = _loss(new) < _loss(kept)
    if _is_worse(kept, best, error) or (gains and not _is_worse(new, best, error)):
        kept = new
    return kept, best


def choose_one(candidates: Sequence[T], error: Callable[[T, T], float]) -> T:
    """The same rule for candidates that are all there: of those within one standard error of the best, that of the lowest loss; the first of equals."""
    best = max(candidates, key=_order)
    return min((one for one in candidates if not _is_worse(one, best, error)), key=_loss)


def _is_worse(one: T, best: T, error: Callable[[T, T], float]) -> bool:
    below = _order(best)[0] - _order(one)[0]
    return below > 0 and below > error(best, one)


def _order(one: Candidate) -> tuple[float, float]:
    """NaN is worse than any number; among equals the lower loss is better."""
    return (-math.inf if math.isnan(one.value) else one.value), -_loss(one)


def _loss(one: Candidate) -> float:
    return math.inf if math.isnan(one.loss) else one.loss


# ---- evaluations, image by image


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, with what its metric was computed from. The rows are in the order of samples, then of labels; damaged images have none."""

    value: float
    loss: float
    samples: Ints
    """[N] numbers in the validation shards."""
    labels: Ints
    columns: npt.NDArray[np.float32]
    """[N, C]: whether the image is right, its loss, its predicted class, or its probabilities, as the metric needs."""

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        numbers = torch.tensor([self.value, self.loss], dtype=torch.float64)
        return {"numbers": numbers, **{name: torch.from_numpy(getattr(self, name)) for name in ("samples", "labels", "columns")}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Evaluated:
        value, loss = tensors["numbers"].tolist()
        return cls(value, loss, *(tensors[name].numpy() for name in ("samples", "labels", "columns")))


class ImageResults:
    """What one evaluation finds for each image of this rank, as its metric needs it; nothing in `add` waits for the device."""

    def __init__(self, monitor: str, classes: list[str] | tuple[str, ...], num_images: int) -> None:
        self.monitor, self._classes = monitor, list(classes)
        self._num_columns = 1 if monitor not in RANKED or len(classes) == 2 else len(classes)
        # More could not be drawn from in time: then the metric itself decides.
        self._is_kept = monitor not in (*RANKED, *_MACRO) or num_images * self._num_columns <= MOST_VALUES
        self._integers: list[Tensor] = [torch.empty(0, 3, dtype=torch.int64)]
        self._floats: list[Tensor] = [torch.empty(0, self._num_columns)]

    def add(self, outputs: Outputs, losses: Tensor) -> None:
        """A batch, and its unweighted losses [B]."""
        if not self._is_kept:
            return
        labels = outputs.labels
        samples = outputs.batch.samples.repeat(len(labels) // len(outputs.batch.samples))
        self._integers.append(torch.stack([samples.to(labels.device, copy=True), labels, (outputs.weights > 0).long()], dim=1))
        self._floats.append(self._columns(outputs, losses).float().reshape(len(labels), self._num_columns))

    def _columns(self, outputs: Outputs, losses: Tensor) -> Tensor:
        if self.monitor == "loss":
            return losses
        if self.monitor in RANKED:
            probabilities = outputs.logits.softmax(dim=1)
            return probabilities[:, 1:] if len(self._classes) == 2 else probabilities
        if self.monitor in _MACRO:
            predicted = first_greatest(outputs.logits)
            return torch.where(outputs.logits.isnan().any(dim=1), -1, predicted)
        return ranks_of_labels(outputs.logits, outputs.labels) < min(5 if self.monitor == "top5" else 1, outputs.logits.shape[1])

    def all_ranks(self, runtime: Runtime, metrics: Mapping[str, Any]) -> Evaluated:
        """The evaluation that came to `metrics`. Every rank must call it, and all get the same."""
        integers, floats = (torch.cat([part.cpu() for part in parts]) for parts in (self._integers, self._floats))
        numbers, columns = rows_of_all_ranks(runtime, integers, floats)
        if self.monitor.startswith(RECALL_OF):
            own = numbers[:, 1] == self._classes.index(self.monitor.removeprefix(RECALL_OF))
            numbers, columns = numbers[own], columns[own]
        value, loss = float(metrics[self.monitor]), float(metrics["loss"])
        return Evaluated(-value if self.monitor == "loss" else value, loss, numbers[:, 0].copy(), numbers[:, 1].copy(), columns)


# ---- the standard error


@dataclass(frozen=True)
class PairedError:
    """The standard error of the difference of a metric of two evaluations of the same images; 0 where it is not known (one image, or too many)."""

    monitor: str
    num_classes: int
    groups: Ints | None = None
    """A number for each validation sample; samples with the same one are drawn together."""

    def __call__(self, one: Evaluated, other: Evaluated) -> float:
        mine, theirs = _shared(one, other, self.num_classes)
        samples = one.samples[mine]
        units = samples if self.groups is None else self.groups[samples]
        first, second = one.columns[mine], other.columns[theirs]
        with np.errstate(invalid="ignore", over="ignore"):
            if not len(units) or np.array_equal(first, second):
                return 0.0
            if self.monitor in (*RANKED, *_MACRO):
                error = self._drawn(units, one.labels[mine], first, second)
            else:
                error = of_mean(first[:, 0].astype(np.float64) - second[:, 0], units)
        return error if math.isfinite(error) else 0.0

    def _drawn(self, units: Ints, labels: Ints, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
        num_units = len(np.unique(units))
        if num_units < 2:
            return 0.0
        bootstrap = Bootstrap(len(units), None if num_units == len(units) else units)
        metric = self._ranked if self.monitor in RANKED else self._macro
        variance = bootstrap.variance(lambda counts: metric(labels, first, counts) - metric(labels, second, counts), per_image=first.shape[1])
        return 0.0 if variance is None else math.sqrt(variance)

    def _macro(self, labels: Ints, columns: npt.NDArray[np.float32], counts: Ints) -> Array:
        predicted = columns[:, 0].astype(np.int64)
        # What is predicted for logits that are no numbers is no class: one more than there are.
        predicted = np.where(predicted < 0, self.num_classes, predicted)
        return macro(*class_counts(counts, labels, predicted, self.num_classes + 1))[_MACRO.index(self.monitor)]

    def _ranked(self, labels: Ints, columns: npt.NDArray[np.float32], counts: Ints) -> Array:
        total, number = np.zeros(len(counts)), np.zeros(len(counts))
        for place in range(columns.shape[1]):
            positive = labels == (1 if self.num_classes == 2 else place)
            if positive.any() and not positive.all():
                values = RANKED[self.monitor](positive, columns[:, place], counts)
                total += np.nan_to_num(values)
                number += np.isfinite(values)
        return total / np.where(number > 0, number, np.nan)


def of_mean(differences: Array, units: Ints) -> float:
    """The standard error of the mean of `differences` [N]; those of one unit come together."""
    _, members = np.unique(units, return_inverse=True)
    sizes = np.bincount(members)
    if len(sizes) < 2:
        return 0.0
    spread = np.bincount(members, weights=differences) - sizes * differences.mean()
    return math.sqrt(len(sizes) / (len(sizes) - 1) * float((spread**2).sum())) / len(differences)


def _shared(one: Evaluated, other: Evaluated, num_classes: int) -> tuple[Any, Any]:
    """The rows of both that are of the same image: one that a server did not give may be missing in either."""
    if np.array_equal(one.samples, other.samples) and np.array_equal(one.labels, other.labels):
        return slice(None), slice(None)
    keys, others = (each.samples * num_classes + each.labels for each in (one, other))
    _, mine, theirs = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
    return mine, theirs
