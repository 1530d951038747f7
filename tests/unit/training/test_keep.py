"""Which weights a phase keeps: the rule against a plain one over the whole list, the standard errors against textbook formulas and scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtl.training.keep import Evaluated, PairedError, choose, choose_one, of_mean

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Seen:
    value: float
    loss: float


VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN])
SEEN = st.lists(st.builds(Seen, VALUES, st.sampled_from([0.0, 0.5, 1.0, 2.0, INF, NAN])), min_size=1, max_size=10)
ERROR = st.sampled_from([0.0, 0.125, 0.25, 0.5, 2.0])


def number(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def by_hand(seen: list[Seen], error: float) -> int:
    """The place of what is kept, from the words of the rule alone."""
    kept = best = 0
    for place, new in enumerate(seen):
        value, loss = number(new.value, -INF), number(new.loss, INF)
        if (value, -loss) > (number(seen[best].value, -INF), -number(seen[best].loss, INF)):
            best = place
        top = number(seen[best].value, -INF)
        out = top > number(seen[kept].value, -INF) + error
        lower = not top > value + error and loss < number(seen[kept].loss, INF)
        kept = place if out or lower else kept
    return kept


def kept_of(seen: list[Seen], error: float) -> list[int]:
    """After each evaluation."""
    own = [Seen(one.value, one.loss) for one in seen]  # each an object of its own
    places, kept, best = [], None, None
    for new in own:
        kept, best = choose(new, kept, best, lambda one, other: error)
        places.append(next(place for place, one in enumerate(own) if one is kept))
    return places


@given(SEEN, ERROR)
def test_the_rule_is_what_its_words_say(seen: list[Seen], error: float) -> None:
    assert kept_of(seen, error) == [by_hand(seen[:length], error) for length in range(1, len(seen) + 1)]


@given(SEEN, ERROR)
def test_what_is_kept_is_never_more_than_an_error_below_the_best(seen: list[Seen], error: float) -> None:
    kept = seen[kept_of(seen, error)[-1]]
    top = max(number(one.value, -INF) for one in seen)
    assert not top > number(kept.value, -INF) + error


@given(SEEN)
def test_without_an_error_the_best_metric_is_kept_and_among_equals_the_lower_loss(seen: list[Seen]) -> None:
    order = [(number(one.value, -INF), -number(one.loss, INF)) for one in seen]
    assert kept_of(seen, 0.0)[-1] == order.index(max(order))


@given(SEEN)
def test_with_a_great_error_the_lowest_loss_is_kept(seen: list[Seen]) -> None:
    finite = [one for one in seen if not math.isnan(one.value)]
    losses = [number(one.loss, INF) for one in finite]
    if finite:
        assert number(finite[kept_of(finite, 2.0)[-1]].loss, INF) == min(losses)


def test_what_the_greedy_rule_can_miss() -> None:
    """The second is within one error of the third and has a lower loss than it, but was passed over for the first, which the third put out."""
    seen = [Seen(0.5, 0.1), Seen(0.7, 0.3), Seen(0.8, 0.9)]
    assert kept_of(seen, 0.25) == [0, 0, 2]


def evaluated(columns: object, labels: object = None, samples: object = None, value: float = 0.0) -> Evaluated:
    found = np.asarray(columns, np.float32)
    found = found[:, None] if found.ndim == 1 else found
    labels = np.zeros(len(found), np.int64) if labels is None else np.asarray(labels, np.int64)
    return Evaluated(value, 1.0, np.arange(len(found)) if samples is None else np.asarray(samples, np.int64), labels, found)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_the_error_of_accuracies_is_that_of_the_mean_difference(pairs: list[tuple[bool, bool]]) -> None:
    first, second = np.asarray(pairs, float).T
    error = PairedError("top1", 3)(evaluated(first), evaluated(second))
    assert error == pytest.approx((first - second).std(ddof=1) / math.sqrt(len(pairs)))


def test_one_image_no_image_and_numbers_that_are_none_have_no_error() -> None:
    assert PairedError("top1", 2)(evaluated([1.0]), evaluated([0.0])) == 0
    assert PairedError("top1", 2)(evaluated([]), evaluated([])) == 0
    assert PairedError("loss", 2)(evaluated([1.0, NAN]), evaluated([0.0, 1.0])) == 0
    assert PairedError("loss", 2)(evaluated([1.0, INF]), evaluated([0.0, INF])) == 0


def test_images_of_one_group_are_one_draw() -> None:
    """Ten copies of each image say no more than one of each."""
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 12)) < 0.7
    alone = PairedError("top1", 2)(evaluated(first), evaluated(second))
    groups = np.repeat(np.arange(12), 10)
    together = PairedError("top1", 2, groups)(evaluated(first.repeat(10)), evaluated(second.repeat(10)))
    assert together == pytest.approx(alone)
    assert of_mean((first.astype(float) - second).repeat(10), np.arange(120)) < alone / 3
    # The four rotations of one image are rows of one sample.
    turns = {"samples": np.repeat(np.arange(12), 4), "labels": np.tile(np.arange(4), 12)}
    assert PairedError("top1", 4)(evaluated(first.repeat(4), **turns), evaluated(second.repeat(4), **turns)) == pytest.approx(alone)


def test_images_that_one_of_the_two_did_not_get_are_left_out() -> None:
    first, second = np.asarray([1, 1, 0, 1, 0.0]), np.asarray([0, 1, 0, 0, 1.0])
    there = [0, 2, 3, 4]
    mine, less = evaluated(first, labels=[0, 1, 1, 0, 1]), evaluated(second[there], labels=[0, 1, 0, 1], samples=there)
    assert PairedError("top1", 2)(mine, less) == pytest.approx((first - second)[there].std(ddof=1) / 2)


@pytest.mark.parametrize("monitor", ["balanced_accuracy", "macro_f1", "auroc", "average_precision"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_other_metrics_are_drawn_the_same_each_time(monitor: str, num_classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, num_classes, 60)
    if monitor in ("auroc", "average_precision"):
        scores = [np.eye(num_classes)[labels] * weight + rng.random((60, num_classes)) for weight in (0.3, 0.6)]
        both = [evaluated(one[:, 1:] if num_classes == 2 else one, labels) for one in scores]
    else:
        both = [evaluated(np.where(rng.random(60) < share, labels, rng.integers(0, num_classes, 60)), labels) for share in (0.5, 0.8)]
    error = PairedError(monitor, num_classes)
    found = error(*both)
    assert found == error(*both) == error(both[1], both[0])
    assert 0.01 < found < 0.15
    assert error(both[0], both[0]) == 0
    assert PairedError(monitor, num_classes, np.zeros(60, np.int64))(*both) == 0  # one group: nothing to draw
    grouped = PairedError(monitor, num_classes, np.arange(60) // 2)(*both)
    assert 0.01 < grouped < 0.2


def test_balanced_accuracy_of_equal_classes_has_the_error_of_accuracy() -> None:
    """Where all classes have as many images, and these are many, both are the same mean."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 400)
    guesses = [np.where(rng.random(800) < share, labels, 1 - labels) for share in (0.7, 0.8)]
    drawn = PairedError("balanced_accuracy", 2)(*(evaluated(one, labels) for one in guesses))
    plain = PairedError("top1", 2)(*(evaluated(one == labels, labels) for one in guesses))
    assert drawn == pytest.approx(plain, rel=0.1)


def test_a_checkpoint_holds_all_of_it() -> None:
    one = Evaluated(NAN, 0.1 + 0.2, np.asarray([3, 5]), np.asarray([1, 0]), np.asarray([[0.1], [INF]], np.float32))
    again = Evaluated.from_tensors({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert math.isnan(again.value)
    assert again.loss == one.loss
    assert all(np.array_equal(getattr(again, name), getattr(one, name)) for name in ("samples", "labels", "columns"))


@given(SEEN, ERROR)
def test_the_rule_of_candidates_that_are_all_there_is_the_same(seen: list[Seen], error: float) -> None:
    best = max(seen, key=lambda one: (number(one.value, -INF), -number(one.loss, INF)))
    top = number(best.value, -INF)
    near = [one for one in seen if not (top > number(one.value, -INF) and top > number(one.value, -INF) + error)]
    chosen = choose_one(seen, lambda one, other: error)
    assert chosen is min(near, key=lambda one: number(one.loss, INF))
    assert choose_one([best, *seen], lambda one, other: 0.0) is best, "of equals the first"
