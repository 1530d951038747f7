"""A temperature that is known is found again; thresholds by hand; what cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest

from dtl.errors import UserError
from dtl.inference.calibrate import Answers, choose_threshold, fit_temperature, held_out, in_words


def drawn(n: int, num_classes: int, *, temperature: float, seed: int = 0) -> Answers:
    """Answers whose probabilities are true at that temperature: each label is drawn from them."""
    random = np.random.Generator(np.random.PCG64(seed))
    logits = (3 * random.normal(size=(n, num_classes))).astype(np.float32)
    probabilities = Answers(logits, np.zeros(n, np.int64), "").probabilities(temperature)
    labels = (probabilities.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    return Answers(logits, labels.astype(np.int64), "data")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_known_temperature_is_found(temperature: float, num_classes: int) -> None:
    found = drawn(4000, num_classes, temperature=temperature)
    fitted = fit_temperature(found)
    assert fitted == pytest.approx(temperature, rel=0.08)
    assert fit_temperature(found) == fitted
    losses = {factor: found.measured(fitted * factor)["loss"] for factor in (0.9, 1.0, 1.1)}
    assert min(losses, key=losses.__getitem__) == 1.0
    halves = held_out(found)
    if temperature != 1:
        assert halves["after"]["loss"] < halves["before"]["loss"]
        assert halves["after"]["calibration_error"] < halves["before"]["calibration_error"] / 2


def test_right_answers_alone_do_not_make_certainty() -> None:
    labels = np.arange(50) % 2
    found = Answers(np.where(np.eye(2)[labels] > 0, 4.0, 0.0).astype(np.float32), labels, "data")
    assert 0.4 < fit_temperature(found) < 1
    many = Answers(np.where(np.eye(16)[np.arange(160) % 16] > 0, 9.0, 0.0).astype(np.float32), np.arange(160) % 16, "data")
    assert 0.4 < fit_temperature(many) < 2, "with many classes too"


def test_answers_that_say_nothing_have_no_temperature() -> None:
    found = drawn(500, 3, temperature=1.0)
    wrong = Answers(-found.logits, found.labels, "data")
    with pytest.raises(UserError, match="no temperature fits: the network's outputs say nothing about these images"):
        fit_temperature(wrong)


@pytest.mark.parametrize("criterion", ["accuracy", "balanced_accuracy", "f1"])
def test_a_threshold_is_the_best_of_all(criterion: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    score = {"accuracy": metrics.accuracy_score, "balanced_accuracy": metrics.balanced_accuracy_score, "f1": metrics.f1_score}[criterion]
    found = drawn(120, 2, temperature=1.0)
    found = Answers(found.logits + np.array([2, 0], np.float32), found.labels, "data")  # the second class is named too seldom
    threshold, value, usual = choose_threshold(found, 1.0, criterion, ("no", "yes"))  # type: ignore[arg-type]
    scores = found.probabilities(1.0)[:, 1]
    best = max(score(found.labels, scores >= at) for at in np.linspace(0.0005, 0.9995, 1999))
    assert threshold.value < 0.4
    assert value == pytest.approx(score(found.labels, scores >= threshold.value))
    assert value >= best - 1e-12
    assert usual == pytest.approx(score(found.labels, scores >= 0.5))
    assert usual < value


def test_no_threshold_for_ten_classes_or_for_one() -> None:
    found = drawn(50, 10, temperature=1.0)
    with pytest.raises(UserError, match="--threshold is for two classes, and this model has 10: leave it out"):
        choose_threshold(found, 1.0, "f1", tuple("abcdefghij"))
    with pytest.raises(UserError, match="a threshold needs images of both classes"):
        choose_threshold(Answers(found.logits[:, :2], np.zeros(50, np.int64), ""), 1.0, "f1", ("a", "b"))


def test_in_words() -> None:
    change = {"before": {"loss": 0.5, "calibration_error": 0.1}, "after": {"loss": 0.4, "calibration_error": 0.05}}
    threshold = {"criterion": "f1", "value": 0.25, "f1": 0.9, "at_one_half": 0.8}
    lines = in_words({"temperature": 1.5, "num_samples": 20, "val": change, "test": {"num_samples": 7, **change}, "threshold": threshold}, ("ant", "bee"))
    assert lines == [
        "temperature 1.5, fitted on 20 validation images",
        "  validation images, each half at the other half's temperature: loss 0.5000 -> 0.4000, calibration error 10.00 -> 5.00 %",
        "  7 test images: loss 0.5000 -> 0.4000, calibration error 10.00 -> 5.00 %",
        "threshold 0.2500: an image is 'bee' from this probability on; f1 90.00 % on the validation images that chose it, 80.00 % at 0.5",
    ]
