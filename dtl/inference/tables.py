"""From the sums of an evaluation to what people and scripts read: rates, pairs, files, a table. K classes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dtl import text
from dtl.data.shards.index import Shards
from dtl.errors import UserError, printable
from dtl.files import write_whole
from dtl.inference.assess import NUM_BINS, Assessment, Confusion, Hard
from dtl.intervals import Bootstrap, Interval, accuracy_interval, shown, wilson
from dtl.text import Column, counted, csv_line
from dtl.training.metrics import RANKED, class_counts, macro, macro_intervals

NUM_PAIRS = 20
DENSE_CLASSES = 1000
"""Up to so many classes the report has the whole confusion matrix."""
CSV_COLUMNS = ("path", "label", "prediction", "probability", "loss")
_TABLE_CLASSES = 30
_NAME_WIDTH = 32
_TABLE_PAIRS = 10
TABLE_HARDEST = 5
_MEAN = "mean over classes"


def report(seen: Assessment, shards: Shards, *, classes: Sequence[str], names: Sequence[str], groups: npt.NDArray[np.int64] | None = None) -> dict[str, Any]:
    """The evaluation as JSON values: None where a rate has nothing to be a share of. `names` are the display names. Every rank must call it.

    `groups`: a group for each image of the shards; intervals then draw whole groups.
    """
    confusion = seen.confusion
    rates = class_rates(confusion)
    occurring = {"label": confusion.labels, "predicted": confusion.predicted, "count": confusion.counts}
    return {
        **{key: _number(value) for key, value in seen.result.items()},
        **_sure(seen, groups, len(classes)),
        "macro": {key: _mean([row[key] for row in rates if row["support"]]) for key in ("precision", "recall", "f1")},
        "calibration_error": _number(seen.calibration_error),
        "calibration": {
            "bins": NUM_BINS,
            "num_samples": seen.bin_samples,
            "accuracy": [correct / num if num else None for correct, num in zip(seen.bin_correct, seen.bin_samples)],
            "confidence": [total / 2**32 / num if num else None for total, num in zip(seen.bin_confidence, seen.bin_samples)],
        },
        "classes": list(classes),
        "per_class": [
            {"label": label, "name": name, **row, **({} if groups is not None else {"recall_interval": wilson(row["recall"], row["support"])})}
            for label, name, row in zip(classes, names, rates)
        ],
        **(
            {"confusion": confusion.dense().tolist()}
            if len(classes) <= DENSE_CLASSES
            else {"confusion": None, "confusion_counts": {key: values.tolist() for key, values in occurring.items()}}
        ),
        "confused_pairs": confused_pairs(confusion, classes),
        "hardest": [_hardest(one, shards, classes) for one in seen.hardest],
        "damaged": [{"path": shards.name(sample), "sample": sample, "reason": reason} for sample, reason in seen.damaged],
    }


def _sure(seen: Assessment, groups: npt.NDArray[np.int64] | None, num_classes: int) -> dict[str, Any]:
    """The metrics that have no sum behind them, and the 95 % interval of each number."""
    found = seen.predictions
    bootstrap = Bootstrap(len(found), None if groups is None else groups[found.samples])
    balanced, f1 = macro(*(one[0] for one in class_counts(np.ones((1, len(found)), np.int64), found.labels, found.predicted, num_classes)))
    intervals = macro_intervals(found.labels, found.predicted, num_classes, bootstrap)
    ranked = dict.fromkeys(RANKED, (None, None)) if seen.ranking is None else seen.ranking.with_intervals(bootstrap)
    return {
        "top1_interval": accuracy_interval((found.labels == found.predicted) & ~np.isnan(found.probability), bootstrap),
        "top5_interval": None if groups is not None else wilson(seen.result["top5"], seen.result["num_samples"]),
        "balanced_accuracy": _number(float(balanced)),
        "balanced_accuracy_interval": intervals[0],
        "macro_f1": _number(float(f1)),
        "macro_f1_interval": intervals[1],
        **{name: value for metric, pair in ranked.items() for name, value in ((metric, pair[0]), (f"{metric}_interval", pair[1]))},
    }


def group_lines(values: dict[str, Any]) -> list[str]:
    """What `by_group` came to, for people."""
    found = {key: "-" if values[key] is None else f"{100 * values[key]:.2f} %" for key in ("top1", "top5", "calibration_error")}
    loss = "-" if values["loss"] is None else f"{values['loss']:.4f}"
    lines = [f"{counted(values['num_groups'], 'group')}, by mean probabilities: top1 {found['top1']}, top5 {found['top5']}, loss {loss}"]
    return lines + [f"  {pair['label']} -> {pair['predicted']}: {counted(pair['count'], 'group')}" for pair in values["confused_pairs"][:_TABLE_PAIRS]]


def write_csv(
    file: str | Path, seen: Assessment, shards: Shards, classes: Sequence[str], *, folds: npt.NDArray[np.int64] | None = None, what: str = "--csv "
) -> None:
    """One line per image, in the order of the data: path, label, prediction, its probability, loss; of a damaged image the path alone.

    `folds` of all images [N] make one more column. `what` names the file in a message.
    """
    found = seen.predictions
    damaged = dict(seen.damaged)
    rows = zip(*(column.tolist() for column in (found.samples, found.labels, found.predicted, found.probability, found.loss)))
    lines: Iterator[tuple[int, tuple[object, ...]]] = (
        (sample, (classes[label], classes[predicted], probability, loss)) for sample, label, predicted, probability, loss in rows
    )
    every = heapq.merge(lines, ((sample, (None,) * 4) for sample in sorted(damaged)), key=itemgetter(0))

    def write(out: IO[bytes]) -> None:
        out.write(csv_line(CSV_COLUMNS if folds is None else (*CSV_COLUMNS, "fold")).encode())
        for sample, cells in every:
            fold = [] if folds is None else [int(folds[sample])]
            out.write(csv_line([shards.name(sample), *cells, *fold]).encode("utf-8", "surrogateescape"))

    try:
        write_whole(Path(file), write)
    except OSError as error:
        raise UserError(f"{what}{file}: cannot be written: {error.strerror or error}") from error


def class_rates(confusion: Confusion) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class.

    A class that is never predicted has precision 0, as scikit-learn has it; one without images has no recall.
    """
    rows = []
    for hits, support, predicted in zip(confusion.hits().tolist(), confusion.by_label().tolist(), confusion.by_prediction().tolist()):
        rows.append(
            {
                "precision": hits / predicted if predicted else (0.0 if support else None),
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + predicted) if support + predicted else None,
                "support": support,
            }
        )
    return rows


def confused_pairs(confusion: Confusion, classes: Sequence[str], limit: int = NUM_PAIRS) -> list[dict[str, Any]]:
    """The wrong answers that were given most often; equal counts in the order of the classes."""
    support = confusion.by_label()
    wrong = np.flatnonzero(confusion.labels != confusion.predicted)
    worst = wrong[np.argsort(-confusion.counts[wrong], kind="stable")[:limit]]
    pairs = []
    for label, predicted, count in zip(*(column[worst].tolist() for column in (confusion.labels, confusion.predicted, confusion.counts))):
        pairs.append({"label": classes[label], "predicted": classes[predicted], "count": count, "share_of_label": count / int(support[label])})
    return pairs


def table(values: dict[str, Any], *, hardest: int = TABLE_HARDEST) -> str:
    """The report for a terminal, with so many of the hardest images. Long lists of classes are cut to those that are recognised worst."""
    rates = [Column("precision", right=True), Column("recall", right=True), Column("F1", right=True)]
    rows = [_row(row["name"], row) for row in [*_worst_classes(values["per_class"]), {"name": _MEAN, **values["macro"]}]]
    lines = [
        f"{counted(values['num_samples'], 'image')}: top1 {_percent(values['top1'])}, top5 {_percent(values['top5'])}, "
        f"loss {_plain(values['loss'])}, calibration error {_percent(values['calibration_error'])}",
        *_sure_lines(values),
        "",
        text.table([Column("class", most=_NAME_WIDTH), *rates, Column("images", right=True)], rows),
    ]
    if len(values["per_class"]) > _TABLE_CLASSES:
        lines.append(f"the {_TABLE_CLASSES} of {len(values['per_class'])} classes with the lowest F1; all are in the JSON file (--json)")
    shown = {row["label"]: row["name"] for row in values["per_class"]}
    if values["confused_pairs"]:
        lines += ["", "most confused classes"]
        for pair in values["confused_pairs"][:_TABLE_PAIRS]:
            share = f"{pair['count']:,} images, {_percent(pair['share_of_label'])} of its class"
            lines.append(printable(f"  {shown[pair['label']]} -> {shown[pair['predicted']]}: {share}"))
    if values["hardest"]:
        lines += ["", "hardest images"]
        for hard in values["hardest"][:hardest]:
            sure = _percent(hard["confidence"])
            right = f"correct ({sure})" if hard["label"] == hard["predicted"] else f"predicted {shown[hard['predicted']]} ({sure})"
            lines.append(printable(f"  loss {_plain(hard['loss'])}  {shown[hard['label']]}, {right}  {hard['path']}"))
    return "\n".join(lines)


def _sure_lines(values: dict[str, Any]) -> list[str]:
    if not values["num_samples"]:
        return []
    named = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC", "average_precision": "average precision"}
    found = [f"{name} {_percent(values[key])}{_within(values[f'{key}_interval'])}" for key, name in named.items() if values[key] is not None]
    return [f"95 % intervals: top1{_within(values['top1_interval'])}; {', '.join(found)}"]


def _within(interval: Interval | None) -> str:
    return f" ({shown(interval)} %)" if interval is not None else " (no interval)"


def _worst_classes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(rows) <= _TABLE_CLASSES:
        return rows
    return sorted(rows, key=lambda row: math.inf if row["f1"] is None else row["f1"])[:_TABLE_CLASSES]


def _row(name: str, row: dict[str, Any]) -> list[str]:
    return [name, *(_percent(row[rate]) for rate in ("precision", "recall", "f1")), f"{row['support']:,}" if "support" in row else ""]


def _hardest(one: Hard, shards: Shards, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "path": shards.name(one.sample),
        "sample": one.sample,
        "label": classes[one.label],
        "predicted": classes[one.predicted],
        "confidence": one.confidence,
        "loss": _number(one.loss),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _plain(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
