"""The solved head: scikit-learn's solution, the same bits on any number of ranks and threads, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtl.keyed import keys
from dtl.optim import solve as module
from dtl.optim.solve import BLOCK, FOLDS, MOST_BYTES, ONE_FOLD, Interrupted, Rows, Solution, Team, bytes_needed, deal, solve, too_large


def _rows(num_samples: int = 300, num_features: int = 24, num_classes: int = 4, *, seed: int = 0, spread: float = 0.6, **more: Any) -> Rows:
    """Features of other scales and means, and classes that overlap."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_samples)
    centres = generator.normal(size=(num_classes, num_features)) * spread
    features = (centres[labels] + generator.normal(size=(num_samples, num_features))) * generator.uniform(0.1, 3, num_features) + generator.normal(
        size=num_features
    )
    return Rows(features.astype(np.float32), torch.from_numpy(labels), torch.ones(num_samples, dtype=torch.float64), **more)


def _folds(rows: Rows) -> np.ndarray:
    numbers = np.arange(len(rows.labels))
    folds = deal(rows.labels.numpy(), numbers, keys(numbers, "test"))
    assert folds is not None
    return folds


def _probabilities(found: Solution, features: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(features).double() @ found.weight.double().T + found.bias.double(), dim=1).numpy()


def _theirs(rows: Rows, inside: np.ndarray, strength: float, *, scale: float) -> np.ndarray:
    """The logarithms of the probabilities of all rows by scikit-learn, from those `inside`: its penalty is that of turned features."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = np.hstack([rows.features / scale, np.ones((len(rows.labels), 1))])
    mean, weights = features[inside].mean(0), rows.weights.numpy()[inside]
    turn = np.linalg.cholesky(strength * weights.sum() * np.eye(len(mean)) + np.outer(mean, mean))
    turned = np.linalg.solve(turn, features.T).T
    theirs = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=5000).fit(turned[inside], rows.labels.numpy()[inside], weights)
    return np.asarray(theirs.predict_log_proba(turned))


def _ranks(number: int, work: Callable[[Team], Solution], threads: int = 1, stop_at: int = -1) -> list[Solution]:
    """`work` in `number` threads that share and gather as processes do."""
    barrier, boxes = threading.Barrier(number), list[Any]([None] * number)

    def team(rank: int) -> Team:
        def everyones(value: Any) -> list[Any]:
            boxes[rank] = value
            barrier.wait()
            values = [box.clone() if isinstance(box, Tensor) else box for box in boxes]
            barrier.wait()
            return values

        asked = iter(range(1, 1_000_000))
        return Team(
            rank,
            number,
            share=lambda value: everyones(value)[0],
            add=lambda sums: torch.stack(everyones(sums)).sum(0),
            stop=lambda: next(asked) == stop_at,
            threads=threads,
        )

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda rank: work(team(rank)), range(number)))


@pytest.mark.parametrize(("strength", "num_samples", "num_features"), [(1.0, 300, 24), (1e-2, 300, 24), (1e-4, 300, 24), (1e-2, 60, 100), (1e-5, 60, 100)])
def test_at_a_fixed_strength_the_probabilities_are_scikit_learns(strength: float, num_samples: int, num_features: int) -> None:
    rows = _rows(num_samples, num_features)
    weights = torch.from_numpy(np.random.default_rng(1).choice([0.0, 0.5, 3.0], len(rows.labels)))  # classes have weights, damaged samples none
    rows = Rows(rows.features, rows.labels, weights)
    found = solve(rows, num_classes=4, folds=None, strengths=[strength])
    used = weights.numpy() > 0
    theirs = _theirs(rows, used, strength, scale=rows.features[used].astype(np.float64).var(0).mean() ** 0.5)
    assert np.abs(_probabilities(found, rows.features) - np.exp(theirs)).max() < 1e-5
    assert found.converged
    assert found.strength == strength
    assert found.path == ()


@pytest.mark.parametrize(("num_samples", "num_features"), [(330, 8), (90, 120)])
def test_any_number_of_ranks_and_threads_gives_the_same_bits(num_samples: int, num_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "LANES", 4)  # of several blocks
    rows = _rows(num_samples, num_features)
    folds = _folds(rows)

    def work(team: Team) -> Solution:
        return solve(rows, num_classes=4, folds=folds, strengths=(0.1, 0.01), team=team)

    one = work(Team())
    for found in [*_ranks(2, work), *_ranks(3, work, threads=2), *_ranks(5, work), work(Team(threads=3))]:
        assert torch.equal(found.weight, one.weight)
        assert torch.equal(found.bias, one.bias)
        assert (found.path, found.loss, found.strength, found.passes) == (one.path, one.loss, one.strength, one.passes)


def test_the_strength_is_that_with_the_lowest_held_out_loss() -> None:
    rows = _rows(200, 100, spread=0.15)
    found = solve(rows, num_classes=4, folds=_folds(rows))
    losses = dict(found.path)
    assert losses[found.strength] == min(losses.values())
    assert len(losses) < len(module.STRENGTHS)
    again = solve(rows, num_classes=4, folds=None, strengths=[found.strength])
    assert np.abs(_probabilities(again, rows.features) - _probabilities(found, rows.features)).max() < 1e-5  # wherever it starts


def _held_out(rows: Rows, folds: np.ndarray, strength: float) -> float:
    """What a path says of a strength, by scikit-learn's solutions; the features are scaled once, not in each fold."""
    labels, right, other = rows.labels.numpy(), 0.0, 0.0
    scale = rows.features.astype(np.float64).var(0).mean() ** 0.5
    for fold in range(FOLDS):
        outside = folds == fold
        logs = _theirs(rows, ~outside, strength, scale=scale)[outside]
        right -= float(logs[np.arange(len(logs)), labels[outside]].sum())
        other -= float(logs.mean(1).sum())
    return (right + other / len(folds)) / (len(folds) + 1)


@pytest.mark.parametrize("columns", [256, 8])
def test_a_path_ranks_the_strengths_as_exact_solutions_do(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", columns)  # of 4 classes two folds at once
    rows = _rows(150, 200, spread=0.15)
    folds = _folds(rows)
    found = solve(rows, num_classes=4, folds=folds)
    path = found.path
    exact = [_held_out(rows, folds, strength) for strength, _ in path]
    assert np.argmin(exact) == np.argmin([loss for _, loss in path])
    assert [loss for _, loss in path] == pytest.approx(exact, rel=0.01)
    assert columns < 256 or found.passes < 80  # it is what a head costs


def test_samples_that_were_all_told_apart_ask_for_no_weaker_strength_than_they_can_answer_for() -> None:
    rows = _rows(60, 100, spread=3)
    found = solve(rows, num_classes=4, folds=_folds(rows))
    assert _probabilities(found, rows.features).max() < 1 - 1e-6
    assert found.strength > module.STRENGTHS[-1]
    assert len(found.path) < len(module.STRENGTHS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_the_objective_is_zero_at_the_solution(smoothing: float) -> None:
    rows = _rows(smoothing=smoothing)
    found = solve(rows, num_classes=4, folds=None, strengths=[0.01])
    features = torch.from_numpy(rows.features).double()
    scale = features.var(0, correction=0).mean().sqrt()
    weight, bias = (found.weight.double() * scale).requires_grad_(), found.bias.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features / scale @ weight.T + bias, rows.labels, label_smoothing=smoothing)
    prior = (features.mean(0) / scale @ weight.T + bias).square().sum() / (2 * len(rows.labels))
    (loss + 0.005 * (weight.square().sum() + bias.square().sum()) + prior).backward()
    assert float(loss.detach()) == pytest.approx(found.loss, abs=1e-6)
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 1e-5


def test_constant_features_have_no_part_in_it() -> None:
    rows = _rows()
    constant = np.repeat(np.array([[0.0, 1e6, -0.1]], np.float32), len(rows.labels), axis=0)
    wider = Rows(np.concatenate([rows.features, constant], axis=1), rows.labels, rows.weights)
    plain, found = (solve(one, num_classes=4, folds=None, strengths=[0.01]) for one in (rows, wider))
    assert torch.equal(found.weight[:, -3:], torch.zeros(4, 3)) or found.weight[:, -3:].abs().max() < 1e-10
    assert np.abs(_probabilities(found, wider.features) - _probabilities(plain, rows.features)).max() < 1e-5


@pytest.mark.parametrize("size", [3, 50])
def test_where_all_features_are_constant_only_biases_are_left(size: int) -> None:
    """Images of one colour, fewer or more of them than features."""
    labels = torch.tensor([0] * 6 + [1] * 3)
    rows = Rows(np.full((9, size), 7.0, np.float32), labels, torch.ones(9, dtype=torch.float64))
    found = solve(rows, num_classes=2, folds=_folds(rows))
    assert found.converged
    assert not found.weight.any()
    assert found.bias[0] > found.bias[1]


def test_rare_and_missing_classes_are_no_obstacle() -> None:
    rows = _rows(400, spread=1.0)
    single = int((rows.labels == 3).nonzero()[0])
    kept = ((rows.labels != 3) | (torch.arange(400) == single)).numpy()
    rows = Rows(rows.features[kept], rows.labels[kept], rows.weights[kept])  # class 3 has one sample, no fold learns it where it is held out; class 4 has none
    found = solve(rows, num_classes=5, folds=_folds(rows))
    assert found.converged
    assert np.isfinite([loss for _, loss in found.path]).all()
    assert found.path[-1][1] < np.log(5)
    assert _probabilities(found, rows.features)[:, 4].max() < 1e-3
    assert _probabilities(found, rows.features)[rows.labels == 3].argmax() == 3


def test_where_nothing_can_be_held_out_the_usual_strength_is_taken() -> None:
    rows = Rows(np.eye(2, dtype=np.float32), torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    numbers = np.arange(2)
    assert deal(numbers, np.zeros(2, np.int64), keys(numbers, "test")) is None
    for folds in (None, deal(numbers, numbers, keys(numbers, "test"))):  # each fold would be asked about the class that it has not seen
        found = solve(rows, num_classes=2, folds=folds)
        assert found.strength == module.USUAL_STRENGTH
        assert found.path == ()
        assert _probabilities(found, rows.features).diagonal().min() > 0.5


def test_folds_keep_groups_together_and_spread_each_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    numbers = np.arange(len(labels))
    single = deal(labels, numbers, keys(numbers, "test"))
    assert single is not None
    for one in range(3):
        counts = np.bincount(single[labels == one], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    groups = numbers // 3
    folds = deal(labels, groups, keys(groups, "test"))
    assert folds is not None
    assert all(len(set(folds[groups == group])) == 1 for group in groups)
    assert set(folds) == set(range(FOLDS))
    many = np.arange(ONE_FOLD)
    large = deal(many % 7, many, keys(many, "test"))
    assert large is not None
    assert set(large) == {0, -1}
    assert np.count_nonzero(large == 0) == ONE_FOLD // FOLDS


class _Counted:
    """Features that note how many rows are asked for at once."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.most = values, values.shape, 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self.most = max(self.most, part.stop - part.start)
        return np.asarray(self.values[part])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_needed(10**6, 2048, 1000) < MOST_BYTES < bytes_needed(10**6, 2048, 21_841)
    assert too_large(10**6, 2048, 1000) == ""
    assert too_large(10**6, 2048, 21_841).endswith("GiB for 21,841 classes of 2,048 features")
    assert too_large(10**7, 2048, 10) == "10,000,000 images with 2,048 features are too many to solve for"
    rows = _rows(3 * BLOCK, 8)
    kept = solve(rows, num_classes=4, folds=None, strengths=[0.1])
    monkeypatch.setattr(module, "KEPT", 0)  # all rows are read again in each pass
    counted = _Counted(rows.features)
    read = solve(Rows(counted, rows.labels, rows.weights), num_classes=4, folds=None, strengths=[0.1])  # type: ignore[arg-type]
    assert counted.most <= BLOCK
    assert torch.equal(read.weight, kept.weight)
    assert read.passes == kept.passes


def test_more_components_than_are_looked_for_change_nothing_but_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows()
    found = solve(rows, num_classes=4, folds=None, strengths=[0.01])
    monkeypatch.setattr(module, "MOST_COMPONENTS", 8)
    plain = solve(rows, num_classes=4, folds=None, strengths=[0.01])
    assert np.abs(_probabilities(plain, rows.features) - _probabilities(found, rows.features)).max() < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_can_be_interrupted_after_any_pass(ranks: int) -> None:
    rows, threads = _rows(), torch.get_num_threads()
    with pytest.raises(Interrupted):
        _ranks(ranks, lambda team: solve(rows, num_classes=4, folds=_folds(rows), team=team), stop_at=40)
    assert torch.get_num_threads() == threads
