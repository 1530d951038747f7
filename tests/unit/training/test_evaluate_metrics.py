"""Metrics: any split of the samples over ranks and batches, with any padding, counts the same."""

from __future__ import annotations

import math

import pytest
import torch

from dtl.training.evaluate import Sums


def _data(num_samples: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are common.
    logits = torch.randint(0, 4, (num_samples, num_classes), generator=generator).float()
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    losses = torch.rand(num_samples, generator=generator)
    return logits, labels, losses


def _naive(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    top1 = top5 = 0
    for row, label in zip(logits.tolist(), labels.tolist()):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        top1 += order[0] == label
        top5 += label in order[:5]
    return top1, top5


@pytest.mark.parametrize("num_classes", [1, 2, 4, 5, 6, 17])
def test_counts_equal_a_plain_count(num_classes: int) -> None:
    logits, labels, losses = _data(101, num_classes)
    sums = Sums(num_classes)
    sums.update(logits, labels, torch.ones(101), losses)
    result = sums.result()
    top1, top5 = _naive(logits, labels)
    assert (result["top1"], result["top5"], result["num_samples"]) == (top1 / 101, top5 / 101, 101)
    assert result["loss"] == pytest.approx(losses.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(("ranks", "batch", "pads"), [(1, 101, 0), (1, 7, 3), (2, 16, 1), (3, 5, 2), (7, 4, 4), (5, 1, 1)])
def test_any_split_and_padding_counts_the_same(ranks: int, batch: int, pads: int) -> None:
    logits, labels, losses = _data(101, 10)
    whole = Sums(10)
    whole.update(logits, labels, torch.ones(101), losses)
    parts = []
    for rank in range(ranks):
        part = Sums(10)
        mine = torch.arange(101)[rank::ranks]
        for chosen in mine.split(batch):
            bad = torch.full((pads, 10), math.inf)
            bad[: pads // 2] = math.nan
            part.update(
                torch.cat([logits[chosen], bad]),
                torch.cat([labels[chosen], torch.zeros(pads, dtype=torch.int64)]),
                torch.cat([torch.ones(len(chosen)), torch.zeros(pads)]),
                torch.cat([losses[chosen], torch.full((pads,), math.nan)]),
            )
        parts.append(part)
    total = parts[0].added(*parts[1:])
    assert torch.equal(total.tensors()[0], whole.tensors()[0])
    assert total.result()["loss"] == pytest.approx(whole.result()["loss"], rel=1e-14)


def test_tensors_survive_the_round_trip_and_are_copies() -> None:
    logits, labels, losses = _data(9, 3)
    sums = Sums(3)
    sums.update(logits, labels, torch.ones(9), losses)
    counts, floats = sums.tensors()
    assert (counts.dtype, floats.dtype, counts.ndim, floats.ndim) == (torch.int64, torch.float64, 1, 1)
    again = sums.from_tensors(counts, floats)
    counts += 1
    floats += 1
    assert again.result() == sums.result()


def test_ties_go_to_the_smaller_class_and_nan_is_never_correct() -> None:
    sums = Sums(3)
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [math.nan, 2.0, 0.0], [math.inf, 1.0, 1.0]])
    sums.update(logits, torch.tensor([0, 1, 1, 0]), torch.ones(4), torch.zeros(4))
    assert sums.result()["top1"] == 0.5


def test_low_precision_logits_and_weighted_losses() -> None:
    sums = Sums(2)
    sums.update(torch.eye(2).bfloat16(), torch.tensor([0, 1]), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0]).bfloat16())
    assert sums.result() == {"top1": 1.0, "top5": 1.0, "loss": 5.0, "num_samples": 2}


def test_nothing_seen_is_not_a_number() -> None:
    result = Sums(4).result()
    assert result["num_samples"] == 0
    assert math.isnan(result["top1"])
    assert math.isnan(result["loss"])
