"""Temperature scaling, and a threshold for two classes: fitted on validation images, kept in model.json, used by predict, evaluate and export.

The network's weights stay as they are, and so do its answers, without a threshold: logits / T has the same order (Guo et al. 2017, arXiv 1706.04599).
N images, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dtl.data.shards.index import Shards
from dtl.errors import UserError
from dtl.inference.assess import NUM_BINS, RankBatches, readable
from dtl.inference.model import RunningModel
from dtl.keyed import permutation
from dtl.models.model_json import Calibration, Threshold
from dtl.text import counted

Array = npt.NDArray[np.float64]
Criterion = Literal["accuracy", "balanced_accuracy", "f1"]
CRITERIA: tuple[Criterion, ...] = ("accuracy", "balanced_accuracy", "f1")
_LOWEST, _HIGHEST = 1e-2, 1e2  # temperatures
_STEPS = 50
_FEWEST = 10


@dataclass(frozen=True)
class Answers:
    """What a network, without any temperature, gives for a set of images, in the order of the images."""

    logits: npt.NDArray[np.float32]
    """[N, K]"""
    labels: npt.NDArray[np.int64]
    data: str
    """The dataset id."""

    def part(self, rows: npt.NDArray[np.int64]) -> Answers:
        return Answers(self.logits[rows], self.labels[rows], self.data)

    def probabilities(self, temperature: float) -> Array:
        scaled = self.logits.astype(np.float64) / temperature
        scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))

    def measured(self, temperature: float = 1.0) -> dict[str, float]:
        """`loss` and `calibration_error` at a temperature."""
        return _measured(self.probabilities(temperature), self.labels)


def answers(model: RunningModel, shards: Shards, *, batch_size: int, workers: int, skip_damaged: bool) -> Answers:
    """One pass of all ranks over the images, the same on every rank. It takes 4 K bytes for each image there. UserError as of an evaluation."""
    runtime, task = model.runtime, model.stored.task
    forward = replace(model.forward, temperature=1.0, threshold=None)
    batches = RankBatches(shards, model.stored.transform, batch_size=batch_size, workers=workers, runtime=runtime)
    mine = [(np.zeros((0, 2), np.int64), np.zeros((0, len(model.stored.classes)), np.float32))]
    with runtime.together("calibration"):
        for outputs in forward.over(readable(batches, skip_damaged=skip_damaged), task):
            real = (outputs.weights > 0).cpu().numpy()
            samples = np.tile(outputs.batch.samples.numpy(), task.expansion)
            mine.append((np.stack([samples, outputs.labels.cpu().numpy()], axis=1)[real], outputs.logits.cpu().numpy()[real]))
    parts = runtime.gather((np.concatenate([one for one, _ in mine]), np.concatenate([one for _, one in mine])))
    numbers, logits = (np.concatenate(column) for column in zip(*parts))
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    found = Answers(logits[order], numbers[order, 1], shards.dataset_id)
    if len(found.labels) < _FEWEST:
        raise UserError(f"a temperature needs at least {_FEWEST} images, and there are {len(found.labels)}")
    if not np.isfinite(found.logits).all():
        raise UserError("the network's outputs are not finite for some images; try --precision no")
    return found


def fit_temperature(found: Answers) -> float:
    """The temperature T of the lowest mean cross-entropy + log(T)^2 / 2N. UserError where none of 0.01 to 100 is.

    The second term, a normal prior of log(T), is worth one image: where all answers are right, cross-entropy alone falls for ever towards T = 0.
    """
    n = len(found.labels)
    logits = found.logits.astype(np.float64)
    own = float(logits[np.arange(n), found.labels].mean())

    def slope(log_temperature: float) -> float:
        """Of what is minimised."""
        temperature = math.exp(log_temperature)
        expected = float((found.probabilities(temperature) * logits).sum(axis=1).mean())
        return (own - expected) / temperature + log_temperature / n

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    if slope(high) <= 0 or slope(low) >= 0:
        raise UserError("no temperature fits: the network's outputs say nothing about these images; evaluate it first (dtl evaluate)")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def held_out(found: Answers) -> dict[str, dict[str, float]]:
    """`before` and `after`, each half of the images measured at the temperature that the other half gives."""
    order = permutation(len(found.labels), 0, "calibrate")
    half = len(order) // 2
    probabilities, labels = [], []
    for mine, others in ((order[:half], order[half:]), (order[half:], order[:half])):
        probabilities.append(found.part(mine).probabilities(fit_temperature(found.part(others))))
        labels.append(found.labels[mine])
    return {"before": found.measured(), "after": _measured(np.concatenate(probabilities), np.concatenate(labels))}


def check_threshold(classes: tuple[str, ...]) -> None:
    """UserError for other than two classes."""
    if len(classes) != 2:
        raise UserError(f"--threshold is for two classes, and this model has {len(classes)}: leave it out")


def choose_threshold(found: Answers, temperature: float, criterion: Criterion, classes: tuple[str, ...]) -> tuple[Threshold, float, float]:
    """The threshold of the second class's probability that is best by the criterion; its value there, and at 0.5. Among equals that nearest to 0.5.

    Candidates lie in the middle between neighbouring probabilities. UserError for more than two classes, or images of one class only.
    """
    check_threshold(classes)
    positive = found.labels == 1
    if positive.all() or not positive.any():
        raise UserError("a threshold needs images of both classes")
    scores = found.probabilities(temperature)[:, 1]
    levels = np.unique(np.concatenate([[0.0], scores, [1.0]]))
    middles = (levels[:-1] + levels[1:]) / 2
    candidates = np.append(middles[(middles > 0) & (middles < 1)], 0.5)
    ups, downs = np.sort(scores[positive]), np.sort(scores[~positive])
    hits = len(ups) - np.searchsorted(ups, candidates)  # of the second class and taken for it: a probability of the threshold or more
    false = len(downs) - np.searchsorted(downs, candidates)
    values = {
        "accuracy": (hits + len(downs) - false) / len(scores),
        "balanced_accuracy": (hits / len(ups) + (len(downs) - false) / len(downs)) / 2,
        "f1": 2 * hits / (len(ups) + hits + false),
    }[criterion]
    best = np.lexsort((np.abs(candidates - 0.5), -values))[0]
    return Threshold(criterion=criterion, value=float(candidates[best])), float(values[best]), float(values[-1])


def calibrate(model: RunningModel, val: Answers, *, criterion: Criterion | None, test: Answers | None = None) -> tuple[Calibration, dict[str, Any]]:
    """What goes into model.json, and all numbers about it as JSON values. `test`: images that the temperature is reported on."""
    temperature = fit_temperature(val)
    found: dict[str, Any] = {"temperature": temperature, "num_samples": len(val.labels), "val": held_out(val)}
    threshold = None
    if criterion is not None:
        threshold, value, usual = choose_threshold(val, temperature, criterion, model.stored.classes)
        found["threshold"] = {"criterion": criterion, "value": threshold.value, criterion: value, "at_one_half": usual}
    if test is not None:
        found["test"] = {"num_samples": len(test.labels), "before": test.measured(), "after": test.measured(temperature)}
    return Calibration(temperature=temperature, threshold=threshold, data=val.data, num_samples=len(val.labels)), found


def in_words(found: dict[str, Any], classes: tuple[str, ...]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"temperature {found['temperature']:.4g}, fitted on {counted(found['num_samples'], 'validation image')}"]
    lines.append(f"  validation images, each half at the other half's temperature: {_change(found['val'])}")
    if "test" in found:
        lines.append(f"  {counted(found['test']['num_samples'], 'test image')}: {_change(found['test'])}")
    if "threshold" in found:
        chosen = found["threshold"]
        name = chosen["criterion"].replace("_", " ")
        lines.append(
            f"threshold {chosen['value']:.4f}: an image is '{classes[1]}' from this probability on; "
            f"{name} {100 * chosen[chosen['criterion']]:.2f} % on the validation images that chose it, {100 * chosen['at_one_half']:.2f} % at 0.5"
        )
    return lines


def _change(values: dict[str, dict[str, float]]) -> str:
    before, after = values["before"], values["after"]
    errors = f"calibration error {100 * before['calibration_error']:.2f} -> {100 * after['calibration_error']:.2f} %"
    return f"loss {before['loss']:.4f} -> {after['loss']:.4f}, {errors}"


def _measured(probabilities: Array, labels: npt.NDArray[np.int64]) -> dict[str, float]:
    own = probabilities[np.arange(len(labels)), labels]
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=NUM_BINS)
    return {"loss": float(-np.log(np.maximum(own, 1e-300)).mean()), "calibration_error": float(np.abs(gaps).sum() / len(labels))}
