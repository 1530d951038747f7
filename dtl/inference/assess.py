"""Everything that is measured of a finished model in one pass, the same numbers at any world size.

The images are cut into batches that do not depend on the number of ranks, and whole batches fall to ranks, so that every logit is
computed in the same batch anywhere. Counts are integers; the few sums of fractions are integers too, in units of 2^-32, or are added
in the order of the batches. B samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.data.loading.batch import Batch
from dtl.data.loading.loader import StepLoader
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import Transform
from dtl.distributed.runtime import Runtime
from dtl.errors import UnreachableSample, UserError
from dtl.optim.losses import Loss
from dtl.runs.predictions import ImagePredictions
from dtl.training.evaluate import ForwardPass, Outputs, PredictionRows, Sums, first_greatest, reduce_sums
from dtl.training.metrics import Ranking, Scores
from dtl.training.phases import Task

NUM_BINS = 15
NUM_HARDEST = 20
_UNIT = 2.0**32
_MOST_SCORES = 1 << 28  # images x classes, 4 bytes each
_COUNT_EVERY = 1 << 22  # images, of which 8 bytes are kept each
_WHAT = ("sample", "label", "predicted")


@dataclass(frozen=True)
class Hard:
    """One of the samples with the greatest loss."""

    sample: int
    label: int
    predicted: int
    loss: float
    confidence: float
    """Probability of the predicted class."""


@dataclass(frozen=True)
class Confusion:
    """How often each (label, predicted) occurs, in this order: as many numbers as pairs that occur, not K x K of them. All int64 [P]."""

    num_classes: int
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, num_classes: int, codes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Confusion:
        """From label * K + predicted and how often, in any order and more than once."""
        found, places = np.unique(codes, return_inverse=True)
        total = np.zeros(len(found), np.int64)
        np.add.at(total, places, counts)
        return cls(num_classes, *np.divmod(found, num_classes), total)

    def by_label(self) -> npt.NDArray[np.int64]:
        """Samples of each class, [K]."""
        return self._total(self.labels, self.counts)

    def by_prediction(self) -> npt.NDArray[np.int64]:
        """How often each class was predicted, [K]."""
        return self._total(self.predicted, self.counts)

    def hits(self) -> npt.NDArray[np.int64]:
        """How often it was right, [K]."""
        return self._total(self.labels, np.where(self.labels == self.predicted, self.counts, 0))

    def dense(self) -> npt.NDArray[np.int64]:
        """[K, K] by (label, predicted)."""
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        matrix[self.labels, self.predicted] = self.counts
        return matrix

    def _total(self, classes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        total = np.zeros(self.num_classes, np.int64)
        np.add.at(total, classes, counts)
        return total


@dataclass(frozen=True)
class Assessment:
    """What all ranks together have seen; equal on all of them."""

    result: dict[str, float | int]
    """top1, top5, loss, num_samples"""
    confusion: Confusion
    bin_samples: list[int]
    bin_correct: list[int]
    bin_confidence: list[int]
    """Sums of the predicted class's probability, in units of 2^-32; bin b holds probabilities in (b / 15, (b + 1) / 15]."""
    hardest: list[Hard]
    """Greatest loss first; equal losses by sample number."""
    damaged: list[tuple[int, str]]
    """(sample, why it counts nowhere)"""
    predictions: ImagePredictions
    """Of each image."""
    ranking: Ranking | None
    """The images by their probabilities; None where these would take more than 1 GiB."""
    groups: GroupSums | None = None
    """Of each group, where groups were given."""

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): mean distance of confidence and accuracy, by bins."""
        total = sum(self.bin_samples)
        gaps = (abs(correct - confidence / _UNIT) for correct, confidence in zip(self.bin_correct, self.bin_confidence))
        return math.fsum(gaps) / total if total else math.nan


@dataclass(frozen=True)
class GroupSums:
    """Of each group of images: the sum of their probabilities, in units of 2^-32 [G, K], how many they were [G], and the lowest and highest label [G]."""

    probabilities: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    lowest: npt.NDArray[np.int64]
    highest: npt.NDArray[np.int64]


class RankBatches:
    """The batches of one rank: whole ones, split the same way at any world size, in the order of the shards."""

    def __init__(self, shards: Shards, transform: Transform, *, batch_size: int, workers: int, runtime: Runtime, shuffle: bool = False) -> None:
        """`shuffle`: in another order, the same one each time."""
        self._plan = EpochPlan(shards.shard_sizes, seed=0, epoch=0, global_batch_size=batch_size, shuffle=shuffle)
        self.num_batches, self.num_images = self._plan.num_steps, shards.num_samples
        self.first = self.num_batches * runtime.rank // runtime.world_size
        self.last = self.num_batches * (runtime.rank + 1) // runtime.world_size
        self._loader = StepLoader(
            shards,
            transform,
            plans=lambda epoch: self._plan,
            layout=RankLayout.for_plan(self._plan, num_ranks=1, micro_batch_size=None),
            rank=0,
            image_size=transform.image_size,
            seed=0,
            workers=workers,
            pin_memory=runtime.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.first == self.last:
            return
        with closing(self._loader.steps(0, self.first, self.last - self.first)) as steps:  # type: ignore[type-var]
            for (batch,) in steps:
                yield batch


def assess(
    forward: ForwardPass,
    batches: RankBatches,
    *,
    task: Task,
    num_outputs: int,
    skip_damaged: bool = False,
    num_hardest: int = NUM_HARDEST,
    flip: bool = False,
    groups: npt.NDArray[np.int64] | None = None,
) -> Assessment:
    """One pass of all ranks over the data. UserError on every rank for a damaged sample, unless those are to be skipped, and for one
    that cannot be read now.

    `flip`: each image is seen mirrored too, and counts with the mean of both probabilities. `groups`: the group of each sample, from 0: their probabilities
    are summed, in integers, so that the sums are the same at any number of ranks.
    What is predicted for each image takes 24 bytes of memory for each on every rank, and its probabilities 4 K bytes on one, as far as these are kept.
    """
    runtime = forward.runtime
    with_scores = batches.num_images * task.expansion * num_outputs <= _MOST_SCORES
    seen = _Seen(num_outputs, batches.num_batches, runtime.device, num_hardest, with_scores=with_scores, groups=groups)
    with runtime.together("evaluation"):
        usable = readable(batches, skip_damaged=skip_damaged)
        for number, outputs in enumerate(forward.over(usable, task, flip=flip), start=batches.first):
            seen.damaged += [(sample, str(damage)) for sample, damage in outputs.batch.bad]
            samples = outputs.batch.samples.to(runtime.device, non_blocking=True).repeat(task.expansion)
            seen.add(number, outputs, samples)
    return seen.all_ranks(runtime)


def readable(batches: Iterable[Batch], *, skip_damaged: bool) -> Iterator[Batch]:
    """The same batches. UserError for a damaged sample, unless those are to be skipped, and for one that cannot be read now."""
    for batch in batches:
        for _, damage in batch.bad:
            if isinstance(damage, UnreachableSample):
                raise damage
            if not skip_damaged:
                raise UserError(f"{damage}; leave such samples out with --on-error skip")
        yield batch


class PairCounts:
    """One rank's part of a `Confusion`. Now and then, after some million images, `add` counts what it has and so waits for the device."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._codes: list[Tensor] = []
        self._num_waiting = 0
        self._counted = _counted(num_classes, [])

    def add(self, labels: Tensor, predicted: Tensor, real: Tensor) -> None:
        """Of a batch, all [B]; what is not `real` counts nowhere."""
        self._codes.append(torch.where(real, labels * self._num_classes + predicted, -1))
        self._num_waiting += len(labels)
        if self._num_waiting >= _COUNT_EVERY:
            self._count()

    def all_ranks(self, runtime: Runtime) -> Confusion:
        """Of all ranks together, the same on each."""
        self._count()
        return _counted(self._num_classes, runtime.gather(self._counted))

    def _count(self) -> None:
        waiting = [np.zeros(0, np.int64), *(codes.cpu().numpy() for codes in self._codes)]
        self._codes, self._num_waiting = [], 0
        codes = np.concatenate(waiting)
        codes = codes[codes >= 0]
        self._counted = _counted(self._num_classes, [self._counted, Confusion.of(self._num_classes, codes, np.ones(len(codes), np.int64))])


def _counted(num_classes: int, parts: Sequence[Confusion]) -> Confusion:
    nothing = np.zeros(0, np.int64)
    codes = np.concatenate([nothing, *(part.labels * num_classes + part.predicted for part in parts)])
    return Confusion.of(num_classes, codes, np.concatenate([nothing, *(part.counts for part in parts)]))


class _Seen:
    """One rank's part; nothing in `add` waits for the device."""

    def __init__(
        self,
        num_outputs: int,
        num_batches: int,
        device: torch.device,
        num_hardest: int,
        *,
        with_scores: bool,
        groups: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._groups = None if groups is None else _SeenGroups(groups, num_outputs, device)
        self._num_hardest = num_hardest
        self._rows, self._scores = PredictionRows(), Scores(num_outputs) if with_scores else None
        self._loss = Loss()
        self._sums, self._pairs = Sums(num_outputs, device), PairCounts(num_outputs)
        self._losses = torch.zeros(num_batches, dtype=torch.float64, device=device)
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.int64, device=device)
        self._hard_numbers = torch.zeros(0, len(_WHAT), dtype=torch.int64, device=device)
        self._hard_values = torch.zeros(0, 2, device=device)
        self.damaged: list[tuple[int, str]] = []

    def add(self, number: int, outputs: Outputs, samples: Tensor) -> None:
        """Batch `number`, and its sample numbers [B] on the device."""
        logits, labels, weights = outputs.logits, outputs.labels, outputs.weights
        losses, _ = self._loss(logits, labels)
        self._rows.add(outputs, losses)
        if self._scores is not None:
            self._scores.add(logits, labels, weights, samples)
        self._sums.update(outputs.decisions, labels, weights, losses)
        real = weights > 0
        self._losses[number] = torch.where(real, losses, 0).double().sum()
        predicted = first_greatest(outputs.decisions)
        confidence = logits.softmax(dim=1).amax(dim=1).nan_to_num(0.0)
        self._pairs.add(labels, predicted, real)
        if self._groups is not None:
            self._groups.add(logits, labels, real, samples)
        correct = real & (first_greatest(logits) == labels) & ~logits.isnan().any(dim=1)
        place = (confidence * NUM_BINS).ceil().long().sub_(1).clamp_(0, NUM_BINS - 1)
        # Scaling by a power of two is exact, so these integers lose nothing and have the same sum in any order.
        counted = (real.long(), correct.long(), torch.where(real, confidence * _UNIT, 0).long())
        for row, values in zip(self._bins, counted):
            row.index_add_(0, place, values)
        hard = losses.nan_to_num(nan=math.inf).masked_fill(~real, -math.inf)
        by_sample = samples.sort(stable=True).indices  # a task may have several rows a sample
        numbers = torch.stack([samples, labels, predicted], dim=1)[by_sample]
        self._keep_hardest(numbers, torch.stack([hard, confidence], dim=1)[by_sample])

    def _keep_hardest(self, numbers: Tensor, values: Tensor) -> None:
        numbers, values = torch.cat([self._hard_numbers, numbers]), torch.cat([self._hard_values, values])
        # Stable, and samples come in order: of equal losses the first sample stays in front.
        order = values[:, 0].sort(descending=True, stable=True).indices[: self._num_hardest]
        self._hard_numbers, self._hard_values = numbers[order], values[order]

    def all_ranks(self, runtime: Runtime) -> Assessment:
        sums = reduce_sums(self._sums, runtime)
        losses, bins = runtime.sum(self._losses.cpu()).tolist(), runtime.sum(self._bins.cpu()).tolist()
        result = sums.result()
        if result["num_samples"]:
            result["loss"] = math.fsum(losses) / result["num_samples"]
        mine = list(zip(self._hard_numbers.tolist(), self._hard_values.tolist()))
        found = [one for part in runtime.gather(mine) for one in part if one[1][0] > -math.inf]
        hardest = sorted((_hard(numbers, values) for numbers, values in found), key=lambda one: (-one.loss, one.sample, one.label))
        return Assessment(
            result=result,
            confusion=self._pairs.all_ranks(runtime),
            bin_samples=bins[0],
            bin_correct=bins[1],
            bin_confidence=bins[2],
            hardest=hardest[: self._num_hardest],
            damaged=sorted({one for part in runtime.gather(self.damaged) for one in part}),
            predictions=self._rows.all_ranks(runtime),
            ranking=None if self._scores is None else self._scores.all_ranks(runtime),
            groups=None if self._groups is None else self._groups.all_ranks(runtime),
        )


class _SeenGroups:
    """One rank's part of the sums of each group."""

    def __init__(self, groups: npt.NDArray[np.int64], num_outputs: int, device: torch.device) -> None:
        number = int(groups.max()) + 1 if len(groups) else 0
        self._codes = torch.from_numpy(groups).to(device)
        self._probabilities = torch.zeros(number, num_outputs, dtype=torch.int64, device=device)
        self._counts = torch.zeros(number, dtype=torch.int64, device=device)
        self._labels = torch.full((2, number), -1, dtype=torch.int64, device=device)  # the highest of K - label, and of label
        self._num_outputs = num_outputs

    def add(self, logits: Tensor, labels: Tensor, real: Tensor, samples: Tensor) -> None:
        codes, units = self._codes[samples], (logits.softmax(dim=1).nan_to_num(0.0).double() * _UNIT).long()
        self._probabilities.index_add_(0, codes, torch.where(real[:, None], units, 0))
        self._counts.index_add_(0, codes, real.long())
        for row, values in zip(self._labels, (self._num_outputs - labels, labels)):
            row.scatter_reduce_(0, codes, torch.where(real, values, -1), "amax")

    def all_ranks(self, runtime: Runtime) -> GroupSums:
        labels = np.max(np.stack(runtime.gather(self._labels.cpu().numpy())), axis=0)
        sums, counts = runtime.sum(self._probabilities.cpu()), runtime.sum(self._counts.cpu())
        return GroupSums(sums.numpy(), counts.numpy(), self._num_outputs - labels[0], labels[1])


def assess_groups(sums: GroupSums, forward: ForwardPass, *, num_outputs: int) -> Assessment:
    """What `assess` measures, with each group as one sample: its answer is the mean of its images' probabilities. Groups without an image count nowhere."""
    seen = _Seen(num_outputs, 1, torch.device("cpu"), 0, with_scores=len(sums.counts) * num_outputs <= _MOST_SCORES)
    counts = torch.from_numpy(sums.counts)
    logits = (torch.from_numpy(sums.probabilities).double() / (_UNIT * counts.clamp(min=1)[:, None])).log().clamp(min=-100.0).float()
    numbers = torch.arange(len(counts))
    batch = Batch(
        images=torch.zeros(0, dtype=torch.uint8),
        labels=torch.from_numpy(sums.highest.clip(0)),
        weights=(counts > 0).float(),
        samples=numbers,
        slots=numbers,
        epoch=0,
        step=0,
    )
    seen.add(0, Outputs(batch, logits, forward.decide(logits), batch.labels, batch.weights), numbers)
    return seen.all_ranks(Runtime.alone("cpu"))


def pooled(parts: Sequence[tuple[Assessment, npt.NDArray[np.int64]]], *, num_hardest: int = NUM_HARDEST) -> Assessment:
    """Several sets of images as one: what `assess` has seen of each in one process, and the number [n] that each of its samples has among all of them.

    It does not depend on the order of the parts: counts are integers, and the images' losses are added exactly and rounded once.
    """
    seen = [one for one, _ in parts]
    num_samples = sum(int(one.result["num_samples"]) for one in seen)

    def share(name: str) -> float:
        found = sum(round(one.result[name] * one.result["num_samples"]) for one in seen if one.result["num_samples"])
        return found / num_samples if num_samples else math.nan

    total_loss = math.fsum(value for one in seen for value in one.predictions.loss.tolist())
    integers = [np.column_stack([where[one.predictions.samples], one.predictions.labels, one.predictions.predicted]) for one, where in parts]
    floats = [np.column_stack([one.predictions.probability, one.predictions.loss]) for one in seen]
    hardest = [replace(hard, sample=int(where[hard.sample])) for one, where in parts for hard in one.hardest]
    rankings = [(one.ranking, where) for one, where in parts if one.ranking is not None]
    with_scores = len(rankings) == len(parts) and num_samples * seen[0].confusion.num_classes <= _MOST_SCORES
    return Assessment(
        result={"top1": share("top1"), "top5": share("top5"), "loss": total_loss / num_samples if num_samples else math.nan, "num_samples": num_samples},
        confusion=_counted(seen[0].confusion.num_classes, [one.confusion for one in seen]),
        bin_samples=[sum(column) for column in zip(*(one.bin_samples for one in seen))],
        bin_correct=[sum(column) for column in zip(*(one.bin_correct for one in seen))],
        bin_confidence=[sum(column) for column in zip(*(one.bin_confidence for one in seen))],
        hardest=sorted(hardest, key=lambda one: (-one.loss, one.sample, one.label))[:num_hardest],
        damaged=sorted((int(where[sample]), reason) for one, where in parts for sample, reason in one.damaged),
        predictions=ImagePredictions.joined(np.concatenate(integers), np.concatenate(floats)),
        ranking=Ranking.joined(rankings) if with_scores else None,
    )


def _hard(numbers: list[int], values: list[float]) -> Hard:
    return Hard(**dict(zip(_WHAT, numbers)), loss=values[0], confidence=values[1])
