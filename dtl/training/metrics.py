"""Exact metrics at any world size: integer counts and float64 sums over real samples, one division at the very end.

B samples, K classes. Nothing here waits for the device; `result()` is the one place that reads numbers back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TOP = 5


class Sums:
    """Counts and sums over the samples seen so far, on one device.

    A slot of weight 0 is a pad: whatever it holds, infinities included, it counts nowhere. The counts of two halves add up to the
    counts of the whole, exactly and in any order, so ranks are reduced by adding `tensors()`.

    A sample is top-k correct if fewer than k classes come before its own: those with a greater logit, and among equal logits those
    with a smaller class number (so a tie is decided the same way everywhere, and never k + 1 classes are right at once). A sample
    with a NaN among its logits is correct in nothing.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, confusion: bool = False) -> None:
        self.num_classes = num_classes
        # int64: num_samples, top1_correct, top5_correct, then [2,K] per class (samples, top1 correct), then [K,K] (label, predicted)
        extra = 2 * num_classes + num_classes * num_classes if confusion else 0
        self._counts = torch.zeros(3 + extra, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=_float64_device(device))
        self._has_confusion = confusion

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor, losses: Tensor) -> None:
        """Add a batch: logits [B,K], labels int64 [B], weights [B] (a weight over 0 is a real sample), losses [B] unweighted."""
        assert logits.shape == (len(labels), self.num_classes)
        assert labels.shape == weights.shape == losses.shape
        with torch.no_grad():
            real = weights > 0
            rank = _rank_of_label(logits, labels)
            top1 = real & (rank == 0)
            top5 = real & (rank < min(_TOP, self.num_classes))
            self._counts[:3] += torch.stack([real.sum(), top1.sum(), top5.sum()])
            where = self._sums.device
            kept, loss, weight = real.to(where), losses.to(where).double(), weights.to(where).double()
            self._sums += torch.stack([torch.where(kept, loss * weight, 0).sum(), torch.where(kept, weight, 0).sum()])
            if self._has_confusion:
                self._count_classes(logits, labels, real, top1)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(int64 vector, float64 vector): add them over ranks, then `from_tensors`. Both have one length on all ranks."""
        return self._counts.clone(), self._sums.clone()

    def from_tensors(self, counts: Tensor, sums: Tensor) -> Sums:
        """Sums like these ones whose `tensors()` are `counts` and `sums`: what an all-reduce gave."""
        assert (counts.shape, sums.shape) == (self._counts.shape, self._sums.shape)
        restored = Sums(self.num_classes, counts.device, confusion=self._has_confusion)
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
        num_samples, top1, top5 = self._counts[:3].tolist()
        loss_sum, weight_sum = self._sums.tolist()
        nan = float("nan")
        return {
            "top1": top1 / num_samples if num_samples else nan,
            "top5": top5 / num_samples if num_samples else nan,
            "loss": loss_sum / weight_sum if weight_sum else nan,
            "num_samples": num_samples,
        }

    def details(self) -> dict[str, Any]:
        """{class_samples [K], class_correct [K], confusion [K][K]} as lists; the confusion is counted by (label, predicted)."""
        assert self._has_confusion, "made with confusion=False"
        k = self.num_classes
        counts = self._counts[3:].cpu()
        return {
            "class_samples": counts[:k].tolist(),
            "class_correct": counts[k : 2 * k].tolist(),
            "confusion": counts[2 * k :].view(k, k).tolist(),
        }

    def _count_classes(self, logits: Tensor, labels: Tensor, real: Tensor, top1: Tensor) -> None:
        k = self.num_classes
        label = torch.where(real, labels, 0)
        predicted = torch.where(real, first_greatest(logits), 0)
        self._counts[3 : 3 + k].index_add_(0, label, real.long())
        self._counts[3 + k : 3 + 2 * k].index_add_(0, label, top1.long())
        self._counts[3 + 2 * k :].index_add_(0, label * k + predicted, real.long())


def _rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
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
