"""The calibration error from its bins, and the confusion matrix from pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.inference import assess
from dtl.inference.assess import NUM_BINS, Assessment, Confusion, PairCounts, pooled
from dtl.runs.predictions import ImagePredictions
from dtl.training.evaluate import Outputs
from dtl.training.metrics import Scores

EMPTY = np.zeros(0, np.int64)
NOTHING = ImagePredictions.joined(np.zeros((0, 3), np.int64), np.zeros((0, 2), np.float32))


def seen(samples: dict[int, int], correct: dict[int, int], confidence: dict[int, float]) -> Assessment:
    def bins(values: dict[int, int]) -> list[int]:
        return [values.get(place, 0) for place in range(NUM_BINS)]

    sums = {place: round(value * 2**32) for place, value in confidence.items()}
    return Assessment({}, Confusion.of(1, EMPTY, EMPTY), bins(samples), bins(correct), bins(sums), [], [], NOTHING, Scores(1).all_ranks(Runtime.alone("cpu")))


def test_calibration_error_is_the_weighted_distance() -> None:
    # 4 images at 0.75 of which 3 are right; 6 at 0.95 of which 3 are right.
    one = seen({11: 4, 14: 6}, {11: 3, 14: 3}, {11: 3.0, 14: 5.7})
    assert one.calibration_error == pytest.approx(0.6 * (0.95 - 0.5))


def test_no_image_has_no_calibration_error() -> None:
    assert math.isnan(seen({}, {}, {}).calibration_error)


def _data(num: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(num_classes, (num,), generator=generator), torch.randint(num_classes, (num,), generator=generator)


def _plain(labels: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> np.ndarray:
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for label, other in zip(labels.tolist(), predicted.tolist()):
        matrix[label, other] += 1
    return matrix


@pytest.mark.parametrize("num_classes", [1, 2, 5, 17])
def test_pairs_equal_a_plain_count(num_classes: int) -> None:
    labels, predicted = _data(101, num_classes)
    pairs = PairCounts(num_classes)
    pairs.add(labels, predicted, torch.ones(101, dtype=torch.bool))
    found, plain = pairs.all_ranks(Runtime.alone("cpu")), _plain(labels, predicted, num_classes)
    assert (found.dense() == plain).all()
    assert found.hits().tolist() == plain.diagonal().tolist()
    assert found.by_label().tolist() == plain.sum(axis=1).tolist() == labels.bincount(minlength=num_classes).tolist()
    assert found.by_prediction().tolist() == plain.sum(axis=0).tolist()
    assert (found.counts > 0).all()
    assert (np.diff(found.labels * num_classes + found.predicted) > 0).all()


@pytest.mark.parametrize(("ranks", "batch", "pads", "count_every"), [(1, 101, 0, 1 << 22), (1, 7, 3, 20), (2, 16, 1, 1), (3, 5, 2, 30), (7, 4, 4, 1 << 22)])
def test_any_split_and_padding_counts_the_same_pairs(ranks: int, batch: int, pads: int, count_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assess, "_COUNT_EVERY", count_every)
    labels, predicted = _data(101, 10)
    runtime = Runtime.alone("cpu")
    parts = []
    for rank in range(ranks):
        part = PairCounts(10)
        for chosen in torch.arange(101)[rank::ranks].split(batch):
            nothing = torch.zeros(pads, dtype=torch.int64)
            real = torch.cat([torch.ones(len(chosen)), torch.zeros(pads)]) > 0
            part.add(torch.cat([labels[chosen], nothing]), torch.cat([predicted[chosen], nothing]), real)
        parts.append(part.all_ranks(runtime))
    runtime.gather = lambda value: parts  # type: ignore[method-assign, assignment]
    assert (PairCounts(10).all_ranks(runtime).dense() == _plain(labels, predicted, 10)).all()


def test_many_classes_take_no_more_than_their_images() -> None:
    """20,000 classes: the matrix would be 3.2 GB."""
    pairs = PairCounts(20_000)
    pairs.add(torch.tensor([19_999, 0, 19_999]), torch.tensor([19_999, 5, 19_999]), torch.tensor([True, True, True]))
    found = pairs.all_ranks(Runtime.alone("cpu"))
    assert (found.labels.tolist(), found.predicted.tolist(), found.counts.tolist()) == ([0, 19_999], [5, 19_999], [1, 2])


# ---- parts of a data set as one


def _measured(logits: torch.Tensor, labels: torch.Tensor) -> Assessment:
    """What one process sees of these images, the last of which is damaged."""
    numbers = torch.arange(len(labels))
    weights = (numbers < len(labels) - 1).float()
    batch = Batch(torch.zeros(0, dtype=torch.uint8), labels, weights, numbers, numbers, 0, 0)
    found = assess._Seen(logits.shape[1], 1, torch.device("cpu"), 5, with_scores=True)
    found.add(0, Outputs(batch, logits, logits, labels, weights), numbers)
    found.damaged = [(len(labels) - 1, "cut off")]
    return found.all_ranks(Runtime.alone("cpu"))


@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_parts_are_one_whole_to_the_last_digit_in_any_order(num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(203, num_classes, generator=generator)
    labels = torch.randint(num_classes, (203,), generator=generator)
    wheres = [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(200), 5)]
    parts = [(_measured(logits[[*where, 202]], labels[[*where, 202]]), np.append(where, 200 + fold)) for fold, where in enumerate(wheres)]
    one = pooled([(_measured(logits[[*range(200), 202]], labels[[*range(200), 202]]), np.arange(201))], num_hardest=5)
    first, second = (pooled(order, num_hardest=5) for order in (parts, parts[::-1]))
    for found in (first, second):
        assert (found.result, found.calibration_error, found.hardest) == (one.result, one.calibration_error, one.hardest)
        assert found.confusion.dense().tolist() == one.confusion.dense().tolist()
        for mine, other in zip(vars(found.predictions).values(), vars(one.predictions).values(), strict=True):
            np.testing.assert_array_equal(mine, other)
        assert found.ranking is not None
        assert one.ranking is not None
        assert [found.ranking.value(name) for name in ("auroc", "average_precision")] == [one.ranking.value(name) for name in ("auroc", "average_precision")]
        assert found.damaged == [(200 + fold, "cut off") for fold in range(5)]
    assert one.result["num_samples"] == 200
