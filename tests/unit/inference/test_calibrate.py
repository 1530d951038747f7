"""A temperature that is known is found again; thresholds by hand; what cannot be fitted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtl.errors import UserError
from dtl.inference import calibrate
from dtl.inference.calibrate import Answers, choose_threshold, compared, fit_temperature, held_out, in_words


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
    losses = {factor: found.seen(fitted * factor).measured()["loss"] for factor in (0.9, 1.0, 1.1)}
    assert min(losses, key=losses.__getitem__) == 1.0
    halves = held_out(found)
    assert halves is not None
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


def test_a_group_stands_in_one_half() -> None:
    """Ten copies of each image as a group: halves of groups give what halves of the images without copies give; halves that tear groups do not."""
    found = drawn(60, 3, temperature=1.6)
    again = np.repeat(np.arange(60), 10)
    copies = Answers(found.logits[again], found.labels[again], "data", again)
    alone, grouped, torn = held_out(found), held_out(copies), held_out(Answers(copies.logits, copies.labels, "data"))
    assert alone is not None and grouped is not None and torn is not None  # noqa: PT018
    assert grouped["after"]["loss"] == pytest.approx(alone["after"]["loss"], rel=0.01)  # the prior is worth a tenth as much
    assert torn["after"]["loss"] != pytest.approx(alone["after"]["loss"], rel=0.001)
    changes = [compared(one.seen(), one.seen(1.6), codes)["change"]["loss"] for one, codes in ((found, None), (copies, again), (copies, None))]
    assert changes[1] == pytest.approx(changes[0]), "ten copies say no more than one"
    assert changes[2][1] - changes[2][0] < (changes[0][1] - changes[0][0]) / 2.5
    for sizes, is_known in (([59, 1], False), ([1, 1, 58], False), ([20, 20, 20], True)):
        halves = held_out(Answers(found.logits, found.labels, "data", np.repeat(np.arange(len(sizes)), sizes)))
        assert (halves is not None) == is_known, sizes
    assert (alone["calibration_error_by_chance"] is None, grouped["calibration_error_by_chance"] is None) == (False, True)


def test_one_group_has_no_halves_and_no_interval() -> None:
    found = drawn(40, 3, temperature=1.5)
    one = Answers(found.logits, found.labels, "data", np.zeros(40, np.int64))
    assert held_out(one) is None
    assert compared(one.seen(), one.seen(2.0), one.groups)["change"] == {"loss": None, "calibration_error": None}


def test_the_interval_of_a_change_is_that_of_the_mean_difference() -> None:
    """Of the loss, by the formula of any textbook; that of the calibration error is as wide as values of other sets of images are apart."""
    found = drawn(400, 4, temperature=1.7)
    before, after = found.seen(), found.seen(1.7)
    change = compared(before, after, None)["change"]
    differences = after.loss - before.loss
    half = 1.96 * differences.std(ddof=1) / 20
    assert change["loss"] == pytest.approx([differences.mean() - half, differences.mean() + half], abs=0.1 * half)
    others = [drawn(400, 4, temperature=1.7, seed=seed) for seed in range(1, 60)]
    errors = [one.seen(1.7).measured()["calibration_error"] - one.seen().measured()["calibration_error"] for one in others]
    assert (change["calibration_error"][1] - change["calibration_error"][0]) / 3.92 == pytest.approx(np.std(errors, ddof=1), rel=0.35)
    assert change == compared(before, after, None)["change"]


def test_true_probabilities_have_a_calibration_error_by_chance() -> None:
    for n, least, most in ((60, 0.06, 0.2), (6000, 0.005, 0.02)):
        found = drawn(n, 4, temperature=1.7)
        seen = found.seen(1.7)
        chance = seen.by_chance()
        assert least < chance < most
        assert chance == seen.by_chance()
        others = [drawn(n, 4, temperature=1.7, seed=seed).seen(1.7).measured()["calibration_error"] for seed in range(1, 30)]
        assert np.mean(others) == pytest.approx(chance, rel=0.15)


def test_logits_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(101, 5, temperature=1.3)
    whole = fit_temperature(found), found.probabilities(1.3), found.seen(1.3).measured()
    monkeypatch.setattr(calibrate, "_CHUNK", 40)
    parts = fit_temperature(found), found.probabilities(1.3), found.seen(1.3).measured()
    assert (whole[0], whole[2]) == (parts[0], parts[2])
    assert np.array_equal(whole[1], parts[1])


def test_more_logits_than_fit_are_refused_with_the_number() -> None:
    """Before any of them is computed."""
    model: Any = SimpleNamespace(runtime=None, stored=SimpleNamespace(task=SimpleNamespace(expansion=1), classes=range(21_841)))
    shards: Any = SimpleNamespace(num_samples=50_000)
    with pytest.raises(UserError) as refused:
        calibrate.answers(model, shards, batch_size=64, workers=0, skip_damaged=False)
    assert str(refused.value) == (
        "calibration keeps 4 bytes for each image and class: 50,000 images of 21,841 classes would take 4.1 GiB on each process, and 1 GiB is the most; "
        "give at most 12,290 images (--data.val SRC, --data.test SRC)"
    )


def test_in_words() -> None:
    change = {
        "before": {"loss": 0.5, "calibration_error": 0.1},
        "after": {"loss": 0.4, "calibration_error": 0.05},
        "change": {"loss": [-0.2, -0.01], "calibration_error": [-0.12, 0.02]},
        "calibration_error_by_chance": 0.045,
    }
    unknown = {**change, "change": {"loss": None, "calibration_error": [0.01, 0.03]}}
    threshold = {"criterion": "f1", "value": 0.25, "f1": 0.9, "at_one_half": 0.8}
    lines = in_words({"temperature": 1.5, "num_samples": 20, "val": change, "test": {"num_samples": 7, **unknown}, "threshold": threshold}, ("ant", "bee"))
    assert lines == [
        "temperature 1.5, fitted on 20 validation images",
        "  validation images, each half at the other half's temperature:",
        "    loss 0.5000 -> 0.4000 (95 % interval of the change -0.2000 to -0.0100: lower)",
        "    calibration error 10.00 -> 5.00 % (95 % interval of the change -12.00 to +2.00: not told apart); 4.50 % is there by chance, with so many images",
        "  7 test images:",
        "    loss 0.5000 -> 0.4000",
        "    calibration error 10.00 -> 5.00 % (95 % interval of the change +1.00 to +3.00: higher); 4.50 % is there by chance, with so many images",
        "threshold 0.2500: an image is 'bee' from this probability on; f1 90.00 % on the validation images that chose it, 80.00 % at 0.5",
    ]
    none = in_words({"temperature": 1.5, "num_samples": 20, "val": None}, ("ant", "bee"))
    assert none[1] == "  validation images: no two halves that have a temperature each (groups too large, or too few images)"
