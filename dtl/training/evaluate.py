"""The forward pass of everything that does not train, and one pass over the validation data.

Validation: integer counts summed over ranks, then one division, so it is exact at any world size. Its loss is the plain cross-entropy,
without smoothing and class weights, so that runs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.network import Network, Normalise, eval_mode, forward_logits, to_device
from dtl.models.norms import statistics_of_batch
from dtl.optim.losses import Loss
from dtl.runs.predictions import ImagePredictions
from dtl.training.phases import Task

STATISTICS_IMAGES = 1024
"""Of which a norm's running statistics are estimated anew: Wu and Johnson 2021 ("Rethinking Batch in BatchNorm") found 10^3 to be enough on ImageNet."""
STATISTICS_BATCH = 32


@dataclass(frozen=True)
class Outputs:
    """What the network gave for one batch. Its B rows are the images as the task made them."""

    batch: Batch
    logits: Tensor
    """float32 [B, K]"""
    decisions: Tensor
    """[B, K] whose greatest value is the predicted class: the logits, unless a threshold decides."""
    labels: Tensor
    """int64 [B], on the device"""
    weights: Tensor
    """float32 [B], on the device: 0 for a pad or a damaged image"""


@dataclass(frozen=True)
class ForwardPass:
    """Images through a network without gradients: normalised on its device, in the runtime's precision.

    Validation, `dtl evaluate`, `dtl predict`, cached features and the report all compute here. The caller sets the module to eval mode.
    """

    module: Callable[[Tensor], Any]
    normalise: Normalise
    runtime: Runtime
    temperature: float = 1.0
    """Logits are divided by it."""
    threshold: float | None = None
    """Of two classes the second is predicted where its probability is this or more."""

    @classmethod
    def of(cls, network: Network, runtime: Runtime, *, temperature: float = 1.0, threshold: float | None = None) -> ForwardPass:
        """The network on the runtime's device and in eval mode."""
        channels_last = to_device(network.module.eval(), runtime.device)
        normalise = Normalise(network.preprocessing, runtime.device, channels_last=channels_last)
        return cls(network.module, normalise, runtime, temperature, threshold)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] of a loader to what the module makes of them, float32: logits [B, K], or a backbone's features."""
        with torch.inference_mode():
            return self._logits(self.normalise(images))

    def over(self, batches: Iterable[Batch], task: Task, *, flip: bool = False) -> Iterator[Outputs]:
        """One batch after another, with the images and labels that the task makes of them. Nothing here waits for the device.

        `flip`: the logarithm of the mean probabilities of each image and its mirror image takes the place of the logits.
        """
        device = self.runtime.device
        for batch in batches:
            with torch.inference_mode():
                labels, weights = batch.labels.to(device, non_blocking=True), batch.weights.to(device, non_blocking=True)
                images, labels, weights = task.prepare(self.normalise(batch.images), labels, weights)
                logits = self._both(images) if flip else self._logits(images)
            yield Outputs(batch, logits, self.decide(logits), labels, weights)

    def decide(self, logits: Tensor) -> Tensor:
        """[B, K] whose greatest value is the predicted class; a row with a NaN stays one."""
        if self.threshold is None:
            return logits
        second = logits.softmax(dim=1)[:, 1:] >= self.threshold
        return torch.cat([~second, second], dim=1).to(logits.dtype).masked_fill(logits.isnan().any(dim=1, keepdim=True), float("nan"))

    def _both(self, images: Tensor) -> Tensor:
        views = torch.stack([self._logits(images), self._logits(images.flip(-1))])
        return views.log_softmax(dim=2).logsumexp(dim=0) - math.log(2.0)

    def flipped(self, images: Tensor) -> Tensor:
        """As a call, with each image's mirror image too: the logarithm of the mean probabilities of both."""
        with torch.inference_mode():
            return self._both(self.normalise(images))

    def _logits(self, images: Tensor) -> Tensor:
        with self.runtime.autocast():
            logits, _ = forward_logits(self.module, images)
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


def evaluate(
    module: nn.Module,
    steps: Iterator[list[Batch]],
    runtime: Runtime,
    *,
    task: Task,
    num_outputs: int,
    loss: Loss,
    normalise: Normalise,
    agree: Callable[[list[Batch]], Callable[[], bool]] | None = None,
    takers: Sequence[Callable[[Outputs, Tensor], None]] = (),
) -> Sums | None:
    """Sums over all ranks, the same on each of them. `steps` is this rank's share, with the same number of steps on every rank.
    `takers` take each batch's outputs, and its unweighted losses [B].

    `agree(batches)` is called before a step, and what it returns after it: that may end the pass, on all ranks at once, and the result is
    None. So ranks can exchange flags while they compute.
    """
    sums, forward = Sums(num_outputs, device=runtime.device), ForwardPass(module, normalise, runtime)
    with eval_mode(module), closing(steps):  # type: ignore[type-var]
        for batches in steps:
            is_over = None if agree is None else agree(batches)
            for outputs in forward.over(batches, task):
                losses, _ = loss(outputs.logits, outputs.labels)
                sums.update(outputs.logits, outputs.labels, outputs.weights, losses)
                for take in takers:
                    take(outputs, losses)
            if is_over is not None and is_over():
                return None
    return reduce_sums(sums, runtime)


def reduce_sums(sums: Sums, runtime: Runtime) -> Sums:
    """The sums of all ranks, on every rank."""
    integers, floats = sums.tensors()
    return sums.from_tensors(runtime.sum(integers.cpu()), runtime.sum(floats.cpu()))


# ---- what is predicted for each image


class PredictionRows:
    """Label, prediction, probability and loss of each image of this rank's share, as they are computed; nothing in `add` waits for the device."""

    def __init__(self) -> None:
        self._samples: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, outputs: Outputs, losses: Tensor) -> None:
        """A batch, and its unweighted losses [B]."""
        logits = outputs.logits
        # Copied: a batch's own tensors may lie in a buffer of the loader.
        self._samples.append(outputs.batch.samples.repeat(len(outputs.labels) // len(outputs.batch.samples)).clone())
        predicted = first_greatest(outputs.decisions)
        self._numbers.append(torch.stack([outputs.labels, predicted, (outputs.weights > 0).long()], dim=1))
        self._values.append(torch.stack([logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0], losses.float()], dim=1))

    def all_ranks(self, runtime: Runtime) -> ImagePredictions:
        """Of all ranks together, without pads and damaged images; every rank must call it, and all get the same."""
        nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 2))
        samples, numbers, values = (torch.cat([none, *(part.cpu() for part in parts)]) for none, parts in zip(nothing, self._parts()))
        integers, floats = rows_of_all_ranks(runtime, torch.stack([samples, numbers[:, 0], numbers[:, 2], numbers[:, 1]], dim=1), values)
        return ImagePredictions.joined(integers[:, [0, 1, 3]], floats)

    def _parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self._samples, self._numbers, self._values


def rows_of_all_ranks(runtime: Runtime, integers: Tensor, floats: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows [n, 3 or more] of sample, label, whether there is an image, and [n, m], of all ranks, without pads, in the order of samples, then of labels.

    Every rank must call it, and all get the same."""
    real = integers[:, 2] > 0
    integers, floats = integers[real], floats[real]
    pad = max(runtime.gather(len(integers))) - len(integers)
    everyone = torch.cat(runtime.gather_rows(torch.cat([integers, integers.new_zeros(pad, integers.shape[1])]))).numpy()
    everyones = torch.cat(runtime.gather_rows(torch.cat([floats, floats.new_zeros(pad, floats.shape[1])]))).numpy()
    found = np.flatnonzero(everyone[:, 2])
    order = found[np.lexsort((everyone[found, 1], everyone[found, 0]))]
    return everyone[order], everyones[order]


# ---- metrics: integer counts and float64 sums over real samples, one division at the very end


_TOP = 5


class Sums:
    """Counts and sums over the samples seen so far, on one device.

    A slot of weight 0 is a pad: whatever it holds, infinities included, it counts nowhere. The counts of two halves add up to the
    counts of the whole, exactly and in any order, so ranks are reduced by adding `tensors()`.

    A sample is top-k correct if fewer than k classes come before its own: those with a greater logit, and among equal logits those
    with a smaller class number (so a tie is decided the same way everywhere, and never k + 1 classes are right at once). A sample
    with a NaN among its logits is correct in nothing.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # num_samples, top1_correct, top5_correct
        self._sums = torch.zeros(2, dtype=torch.float64, device=_float64_device(device))

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor, losses: Tensor) -> None:
        """Add a batch: logits [B,K], labels int64 [B], weights [B] (a weight over 0 is a real sample), losses [B] unweighted."""
        assert logits.shape == (len(labels), self.num_classes)
        assert labels.shape == weights.shape == losses.shape
        with torch.no_grad():
            real = weights > 0
            rank = ranks_of_labels(logits, labels)
            top1 = real & (rank == 0)
            top5 = real & (rank < min(_TOP, self.num_classes))
            self._counts += torch.stack([real.sum(), top1.sum(), top5.sum()])
            where = self._sums.device
            kept, loss, weight = real.to(where), losses.to(where).double(), weights.to(where).double()
            self._sums += torch.stack([torch.where(kept, loss * weight, 0).sum(), torch.where(kept, weight, 0).sum()])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(int64 vector, float64 vector): add them over ranks, then `from_tensors`. Both have one length on all ranks."""
        return self._counts.clone(), self._sums.clone()

    def from_tensors(self, counts: Tensor, sums: Tensor) -> Sums:
        """Sums like these ones whose `tensors()` are `counts` and `sums`: what an all-reduce gave."""
        assert (counts.shape, sums.shape) == (self._counts.shape, self._sums.shape)
        restored = Sums(self.num_classes, counts.device)
        restored._counts, restored._sums = counts.clone(), sums.clone()
        return restored

    def added(self, *others: Sums) -> Sums:
        """The sums of these parts of a data set together."""
        counts, sums = self.tensors()
        for part in others:
            counts, sums = counts + part._counts, sums + part._sums
        return self.from_tensors(counts, sums)

    def result(self) -> dict[str, float | int]:
        """{top1, top5, loss, num_samples}: shares from 0 to 1 and the weighted mean loss; NaN where no sample was seen."""
        num_samples, top1, top5 = self._counts.tolist()
        loss_sum, weight_sum = self._sums.tolist()
        nan = float("nan")
        return {
            "top1": top1 / num_samples if num_samples else nan,
            "top5": top5 / num_samples if num_samples else nan,
            "loss": loss_sum / weight_sum if weight_sum else nan,
            "num_samples": num_samples,
        }


def ranks_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label's, int64 [B]; K where the row has a NaN."""
    num_classes = logits.shape[1]
    own = logits.gather(1, labels.clamp(0, num_classes - 1)[:, None])
    earlier = torch.arange(num_classes, device=logits.device)[None, :] < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return torch.where(logits.isnan().any(dim=1), num_classes, before.sum(dim=1))


def first_greatest(logits: Tensor) -> Tensor:
    """The smallest class number of the greatest logit [B]: argmax leaves ties open, and counts NaN as greatest."""
    finite = logits.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    greatest = finite.max(dim=1, keepdim=True).values
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(finite == greatest, classes, logits.shape[1]).min(dim=1).values


def _float64_device(device: torch.device | str) -> torch.device:
    """Apple's GPUs have no float64; the sums then live on the host (and reading them there does wait)."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


def estimate_statistics(
    forward: ForwardPass,
    module: nn.Module,
    names: Sequence[str],
    num_batches: int,
    stream: Iterator[list[Batch]],
    *,
    stops: Callable[[list[Batch]], bool],
) -> bool:
    """Give the batch norms `names` the running statistics that `module` has on `num_batches` batches, of which `stream` gives this rank's stretch: the
    same statistics at any number of ranks. False: stop (on all ranks).

    `stops(batches)` is called by all ranks before each batch: it takes damaged images, and says whether to stop. Means and variances are those over all images,
    where each batch has been normalised by its own before it reaches a norm, as in training.
    """
    runtime, norms = forward.runtime, [part for name in names if isinstance(part := module.get_submodule(name), _BatchNorm)]
    width = sum(len(norm.running_mean) for norm in norms if norm.running_mean is not None)
    most = -(-num_batches // runtime.world_size)
    rows = torch.zeros(most, 1 + 2 * width, dtype=torch.float64)
    """Of this rank's batches: the number of images, the means [C] and the variances [C]."""
    with eval_mode(module), closing(stream):  # type: ignore[type-var]
        for row in rows:
            batches = next(stream, [])
            if stops(batches):
                return False
            for batch in batches:
                images = batch.images[batch.weights > 0]
                if len(images) > 1:  # a batch of one has no variance where a channel has one value
                    row[0] = len(images)
                    row[1:] = statistics_of_batch(norms, partial(forward, images)).flatten().cpu()
    everyone = torch.cat(runtime.gather_rows(rows))  # rank by rank: in the order of the batches, whatever R is, but for rows of zeros
    counts, means, variances = everyone[:, :1], everyone[:, 1 : 1 + width], everyone[:, 1 + width :]
    total = counts.sum()
    if not total:
        return True
    mean, square = ordered_sum(counts * means) / total, ordered_sum(counts * (variances + means**2)) / total
    place = 0
    with torch.no_grad():
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            own = slice(place, place := place + len(norm.running_mean))
            norm.running_mean.copy_(mean[own])
            norm.running_var.copy_((square - mean**2)[own])
    return True


def ordered_sum(rows: Tensor) -> Tensor:
    """Over the first dimension, one row after another: rows of zeros in between, of which there are as many as ranks, change no bit."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total
