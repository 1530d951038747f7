"""Balanced accuracy, macro F1, AUROC and average precision: scikit-learn's, at any number of processes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.intervals import Bootstrap
from dtl.training.metrics import Scores, auroc, average_precision, check_monitor, class_counts, macro


def drawn(n: int, num_classes: int, *, levels: int) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
    """Labels and logits that follow them; of few levels, so that there are ties."""
    random = torch.Generator().manual_seed(n + num_classes)
    labels = torch.arange(n) % num_classes
    logits = torch.randn(n, num_classes, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, num_classes)
    return labels.numpy(), (logits * levels).round() / levels


def scores_of(labels: npt.NDArray[np.int64], logits: torch.Tensor) -> Scores:
    scores = Scores(logits.shape[1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for part in order.split(7):
        padded = torch.cat([part, part[:1]])  # a pad, which counts nowhere
        weights = torch.cat([torch.ones(len(part)), torch.zeros(1)])
        scores.add(logits[padded], torch.from_numpy(labels)[padded], weights, padded)
    return scores


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("levels", [1, 1000])
def test_ranking_metrics_equal_scikit_learns(num_classes: int, levels: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, logits = drawn(200, num_classes, levels=levels)
    with Runtime.alone("cpu") as runtime:
        ranking = scores_of(labels, logits).all_ranks(runtime)
    probabilities = logits.softmax(dim=1).numpy()
    each = range(1, 2) if num_classes == 2 else range(num_classes)
    for name, theirs in (("auroc", sklearn.roc_auc_score), ("average_precision", sklearn.average_precision_score)):
        assert ranking.value(name) == pytest.approx(np.mean([theirs(labels == k, probabilities[:, k]) for k in each]), abs=1e-12)
    if num_classes > 2 and levels > 1:
        assert ranking.value("auroc") == pytest.approx(sklearn.roc_auc_score(labels, probabilities.astype(np.float64), multi_class="ovr"), abs=1e-4)


def test_averages_over_classes_equal_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, logits = drawn(200, 7, levels=10)
    predicted = logits.argmax(dim=1).numpy()
    balanced, f1 = macro(*(one[0] for one in class_counts(np.ones((1, 200), np.int64), labels, predicted, 7)))
    assert float(balanced) == pytest.approx(sklearn.balanced_accuracy_score(labels, predicted), abs=1e-15)
    assert float(f1) == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"), abs=1e-15)


def test_values_by_hand() -> None:
    """Positives at 0.8, 0.4, 0.4; negatives at 0.6, 0.4: of six pairs two and two halves are in order."""
    positive, scores = np.array([1, 1, 1, 0, 0], bool), np.array([0.8, 0.4, 0.4, 0.6, 0.4])
    assert auroc(positive, scores).tolist() == [3 / 6]
    assert average_precision(positive, scores).tolist() == [pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 5)]


def test_how_often_an_image_is_drawn_is_as_if_it_were_there_so_often() -> None:
    labels, logits = drawn(40, 2, levels=3)
    scores, positive = logits.softmax(dim=1)[:, 1].numpy(), labels == 1
    for counts in Bootstrap(40).counts(5):
        for metric in (auroc, average_precision):
            for row, value in zip(counts, metric(positive, scores, counts)):
                assert value == pytest.approx(metric(np.repeat(positive, row), np.repeat(scores, row))[0], abs=1e-14)


def test_where_there_is_no_order_there_is_no_value() -> None:
    assert math.isnan(auroc(np.array([True, True]), np.array([0.1, 0.2]))[0])
    assert math.isnan(auroc(np.array([True, False]), np.array([0.1, math.nan]))[0])
    assert math.isnan(average_precision(np.array([], bool), np.array([]))[0])
    with Runtime.alone("cpu") as runtime:
        ranking = scores_of(np.zeros(4, np.int64), torch.zeros(4, 3)).all_ranks(runtime)
        assert math.isnan(ranking.value("auroc"))
        assert ranking.with_intervals(Bootstrap(4)) == {"auroc": (None, None), "average_precision": (None, None)}


def test_a_monitored_class_must_be_there() -> None:
    check_monitor("recall:wasp", ("bee", "wasp"), [1, 2])
    check_monitor("auroc", ("bee", "wasp"), [1, 2])
    with pytest.raises(UserError, match=r"checkpoint\.monitor is recall:wsp, but there is no class 'wsp'; did you mean 'wasp'\?"):
        check_monitor("recall:wsp", ("bee", "wasp"), [1, 2])
    with pytest.raises(UserError, match="but no validation image is of the class 'bee'"):
        check_monitor("recall:bee", ("bee", "wasp"), [0, 2])
