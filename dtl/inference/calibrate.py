"""Temperature scaling, and a threshold for two classes: fitted on validation images, kept in model.json, used by predict, evaluate and export.

The network's weights stay as they are, and so do its answers, without a threshold: logits / T has the same order (Guo et al. 2017, arXiv 1706.04599).
N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dtl.data.shards.index import Shards
from dtl.errors import UserError
from dtl.inference.assess import NUM_BINS, RankBatches, readable
from dtl.inference.model import RunningModel
from dtl.intervals import Bootstrap
from dtl.keyed import permutation, uniform
from dtl.models.model_json import Calibration, Threshold
from dtl.text import counted

Array = npt.NDArray[np.float64]
Criterion = Literal["accuracy", "balanced_accuracy", "f1"]
CRITERIA: tuple[Criterion, ...] = ("accuracy", "balanced_accuracy", "f1")
_LOWEST, _HIGHEST = 1e-2, 1e2  # temperatures
_STEPS = 50
_FEWEST = 10
_MOST_LOGITS = 1 << 28  # images x classes, 4 bytes each
_CHUNK = 1 << 22  # logits that are worked on at a time
_DRAWS = 200
_Z = 1.959963984540054

Measured = dict[str, float]
"""`loss` (mean cross-entropy) and `calibration_error` (expected calibration error), which sees the predicted class alone."""


@dataclass(frozen=True)
class Seen:
    """What the two measures need of each image at one temperature, all [N]."""

    loss: Array
    confidence: Array
    """Probability of the predicted class."""
    right: npt.NDArray[np.bool_]

    def measured(self) -> Measured:
        return {"loss": float(self.loss.mean()), "calibration_error": float(self._error(np.ones((1, len(self.loss)), np.int64))[0])}

    def by_chance(self) -> float:
        """The calibration error that so many images with these confidences have on average if each is right as often as it says: bins of few images
        never agree exactly. From seeded draws."""
        images = np.arange(len(self.loss))
        drawn = (replace(self, right=uniform(images, 0, "calibration", draw) < self.confidence).measured() for draw in range(_DRAWS))
        return math.fsum(one["calibration_error"] for one in drawn) / _DRAWS

    def change_from(self, before: Seen, bootstrap: Bootstrap) -> dict[str, list[float] | None]:
        """The 95 % interval of how much each measure has changed on these images; None where it is not known (one group, or too many images)."""
        now, then = self.measured(), before.measured()
        draws = bootstrap.num_draws() if bootstrap.num_units > 1 else 0
        if not draws:
            return dict.fromkeys(now)
        drawn = [[self.drawn(name, counts) - before.drawn(name, counts) for name in now] for counts in bootstrap.counts(draws)]
        halves = [_Z * float(np.concatenate(parts).std(ddof=1)) for parts in zip(*drawn)]
        return {name: [now[name] - then[name] - half, now[name] - then[name] + half] for name, half in zip(now, halves)}

    def drawn(self, measure: str, counts: npt.NDArray[np.int64]) -> Array:
        """A measure of each draw: `counts` [D, N] says how often each image is in it."""
        return np.asarray((counts @ self.loss) / counts.sum(axis=1)) if measure == "loss" else self._error(counts)

    def _error(self, counts: npt.NDArray[np.int64]) -> Array:
        gaps = np.zeros((len(self.loss), NUM_BINS))
        places = np.clip(np.ceil(self.confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        gaps[np.arange(len(places)), places] = self.right - self.confidence
        return np.asarray(np.abs(counts @ gaps).sum(axis=1) / counts.sum(axis=1))


@dataclass(frozen=True)
class Answers:
    """What a network, without any temperature, gives for a set of images, in the order of the images."""

    logits: npt.NDArray[np.float32]
    """[N, K]"""
    labels: npt.NDArray[np.int64]
    data: str
    """The dataset id."""
    groups: npt.NDArray[np.int64] | None = None
    """A number for each image [N]; those with the same one belong together (one patient, or the rotations of one image). None: each by itself."""

    def part(self, rows: npt.NDArray[np.int64]) -> Answers:
        return Answers(self.logits[rows], self.labels[rows], self.data, None if self.groups is None else self.groups[rows])

    def probabilities(self, temperature: float) -> Array:
        return np.concatenate([np.zeros((0, self.logits.shape[1])), *(probabilities for _, probabilities in self._chunks(temperature))])

    def seen(self, temperature: float = 1.0) -> Seen:
        n = len(self.labels)
        loss, confidence, right = np.zeros(n), np.zeros(n), np.zeros(n, bool)
        for rows, probabilities in self._chunks(temperature):
            labels = self.labels[rows]
            loss[rows] = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300))
            confidence[rows], right[rows] = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        return Seen(loss, confidence, right)

    def expected_logit(self, temperature: float) -> float:
        """The mean over images of the logit that the probabilities expect."""
        return float(np.concatenate([(probabilities * self.logits[rows]).sum(axis=1) for rows, probabilities in self._chunks(temperature)]).mean())

    def _chunks(self, temperature: float) -> Iterator[tuple[slice, Array]]:
        """So that float64 takes a bounded part of memory."""
        size = max(1, _CHUNK // self.logits.shape[1])
        for first in range(0, len(self.labels), size):
            rows = slice(first, first + size)
            scaled = self.logits[rows].astype(np.float64) / temperature
            scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
            yield rows, scaled / scaled.sum(axis=1, keepdims=True)


def answers(model: RunningModel, shards: Shards, *, batch_size: int, workers: int, skip_damaged: bool, groups: npt.NDArray[np.int64] | None = None) -> Answers:
    """One pass of all ranks over the images, the same on every rank. `groups`: a number for each sample of the shards.

    It takes 4 K bytes for each image on every rank, and as much again while ranks exchange them. UserError as of an evaluation, and where that is over 1 GiB.
    """
    runtime, task = model.runtime, model.stored.task
    num_images, num_classes = shards.num_samples * task.expansion, len(model.stored.classes)
    if num_images * num_classes > _MOST_LOGITS:
        raise UserError(
            f"calibration keeps 4 bytes for each image and class: {num_images:,} images of {num_classes:,} classes would take "
            f"{num_images * num_classes * 4 / 2**30:.1f} GiB on each process, and 1 GiB is the most; give at most {_MOST_LOGITS // num_classes:,} images "
            "(--data.val SRC, --data.test SRC)"
        )
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
    samples = numbers[order, 0]
    own = samples if task.expansion > 1 else None
    found = Answers(logits[order], numbers[order, 1], shards.dataset_id, own if groups is None else groups[samples])
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
    own = float(found.logits[np.arange(n), found.labels].astype(np.float64).mean())

    def slope(log_temperature: float) -> float:
        """Of what is minimised."""
        temperature = math.exp(log_temperature)
        return (own - found.expected_logit(temperature)) / temperature + log_temperature / n

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    if slope(high) <= 0 or slope(low) >= 0:
        raise UserError("no temperature fits: the network's outputs say nothing about these images; evaluate it first (dtl evaluate)")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def halves_of(found: Answers) -> list[npt.NDArray[np.int64]] | None:
    """The rows of two halves, the same ones each time; a group is in one of them. None where groups are so large that one has next to no images."""
    codes = np.arange(len(found.labels)) if found.groups is None else found.groups
    groups, members = np.unique(codes, return_inverse=True)
    order = permutation(len(groups), 0, "calibrate")
    ends = np.cumsum(np.bincount(members, minlength=len(groups))[order])
    first = np.isin(members, order[ends <= max(len(codes) // 2, ends[0])])
    halves = [np.flatnonzero(first), np.flatnonzero(~first)]
    return halves if min(map(len, halves)) >= _FEWEST // 2 else None


def crossed(found: Answers) -> Seen | None:
    """Each half of the images at the temperature that the other half gives. None where there are no halves, or no temperature fits one."""
    halves = halves_of(found)
    if halves is None:
        return None
    try:
        temperatures = [fit_temperature(found.part(other)) for other in reversed(halves)]
    except UserError:
        return None
    parts = [found.part(mine).seen(temperature) for mine, temperature in zip(halves, temperatures)]
    back = np.argsort(np.concatenate(halves))
    return Seen(*(np.concatenate([getattr(part, name) for part in parts])[back] for name in ("loss", "confidence", "right")))


def held_out(found: Answers) -> dict[str, Any] | None:
    """The images before any temperature and `crossed`: JSON values."""
    after = crossed(found)
    return None if after is None else compared(found.seen(), after, found.groups)


def compared(before: Seen, after: Seen, groups: npt.NDArray[np.int64] | None) -> dict[str, Any]:
    """JSON values: both measures `before` and `after`, the 95 % interval of their `change` (a seeded bootstrap of images, or of whole groups), and the
    calibration error that is there by chance (None with groups, whose images are right and wrong together)."""
    change = after.change_from(before, Bootstrap(len(before.loss), groups))
    return {
        "before": before.measured(),
        "after": after.measured(),
        "change": change,
        "calibration_error_by_chance": after.by_chance() if groups is None else None,
    }


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
        found["test"] = {"num_samples": len(test.labels), **compared(test.seen(), test.seen(temperature), test.groups)}
    return Calibration(temperature=temperature, threshold=threshold, data=val.data, num_samples=len(val.labels)), found


def in_words(found: dict[str, Any], classes: tuple[str, ...]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"temperature {found['temperature']:.4g}, fitted on {counted(found['num_samples'], 'validation image')}"]
    if found["val"] is None:
        lines.append("  validation images: no two halves that have a temperature each (groups too large, or too few images)")
    else:
        lines += _compared("validation images, each half at the other half's temperature", found["val"])
    if "test" in found:
        lines += _compared(counted(found["test"]["num_samples"], "test image"), found["test"])
    if "threshold" in found:
        chosen = found["threshold"]
        name = chosen["criterion"].replace("_", " ")
        lines.append(
            f"threshold {chosen['value']:.4f}: an image is '{classes[1]}' from this probability on; "
            f"{name} {100 * chosen[chosen['criterion']]:.2f} % on the validation images that chose it, {100 * chosen['at_one_half']:.2f} % at 0.5"
        )
    return lines


def _compared(what: str, values: dict[str, Any]) -> list[str]:
    lines = [f"  {what}:"]
    for name, shown, scale, unit in (("loss", "loss", 1, ""), ("calibration_error", "calibration error", 100, " %")):
        digits = 4 if scale == 1 else 2
        before, after = (scale * values[when][name] for when in ("before", "after"))
        line = f"    {shown} {before:.{digits}f} -> {after:.{digits}f}{unit}"
        if values["change"][name] is not None:
            low, high = (scale * end for end in values["change"][name])
            sure = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
            line += f" (95 % interval of the change {low:+.{digits}f} to {high:+.{digits}f}: {sure})"
        lines.append(line)
    if values["calibration_error_by_chance"] is not None:
        lines[-1] += f"; {100 * values['calibration_error_by_chance']:.2f} % is there by chance, with so many images"
    return lines
