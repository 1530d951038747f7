"""The page of a cross-validation: what its folds come to together, and each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.intervals import Interval, shown
from dtl.report import html
from dtl.report.confusion import MOST_NAMES, ClassNumbers, classes_figure, confusion_figure
from dtl.report.fonts import covers
from dtl.report.html import Cell
from dtl.report.single import embed_plot, footer, prepare_folder, write_page
from dtl.report.style import percent
from dtl.text import counted


def make_folds_page(folder: Path, values: dict[str, Any], labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> Path:
    """Write report/index.html and its plots into the folds' folder; returns the page. `values` are those of results.json, `labels` and `predicted` [n] those
    of the images. UserError where it cannot be written."""
    out = prepare_folder(folder / "report")
    lead: list[html.Block] = [html.Headline(_numbers(values)), html.Facts(_facts(values))]
    sections = [_folds(values), _confusion(out, values, labels, predicted)]
    return write_page(out, html.page(folder.name, lead, sections, footer=footer()))


def _numbers(values: dict[str, Any]) -> list[tuple[str, str]]:
    known = {"top1": "top-1, each image predicted by the run without it", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}
    numbers = []
    for key, what in known.items():
        if values[key] is not None:
            within = _within(values[f"{key}_interval"])
            numbers.append((percent(values[key], 2), f"{what} ({within})" if within else what))
    return [*numbers, (f"{values['num_samples']:,}", "images")]


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = values["range"]["top1"]
    groups = "stratified" if values["num_groups"] is None else f"{counted(values['num_groups'], 'group')}, each in one fold"
    return [
        ("Folds", f"{values['folds']} ({groups}), seed {values['seed']}"),
        ("Top-1 of the folds", f"{percent(values['mean']['top1'], 2)} on average, {percent(low, 2)} to {percent(high, 2)}"),
        ("Right", f"{values['correct']:,} of {counted(values['num_samples'], 'image')}"),
        ("Network on all images", values["refit"] or "not trained (--refit); its expected accuracy is that of the folds"),
    ]


def _folds(values: dict[str, Any]) -> html.Section:
    names = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC", "loss": "loss"}
    rows = [
        [
            Cell(str(row["fold"])),
            Cell(f"{row['num_samples']:,}", number=True),
            Cell(percent(row["top1"], 2), number=True),
            Cell(shown(row["top1_interval"]) or "–", number=True),
            *(Cell("–" if row[key] is None else f"{row[key]:.4f}" if key == "loss" else percent(row[key], 2), number=True) for key in names),
        ]
        for row in [*values["per_fold"], {**values, "fold": "all"}]
    ]
    about = "Each fold is the test set of one run, which chose nothing by it. The last line counts all images together: it is no mean of the others."
    return html.section("Folds", html.Table(["fold", "images", "top-1", "95\u00a0% interval", *names.values()], rows), html.Text(about, soft=True))


def _confusion(out: Path, values: dict[str, Any], labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> html.Section:
    names = [row["name"] for row in values["per_class"]]
    drawn = [name if len(names) > MOST_NAMES or covers(name) else f"class {label}" for label, name in enumerate(names)]
    counts = ClassNumbers.count(labels, predicted, len(names))
    matrix = embed_plot(
        out / "confusion.png",
        lambda: confusion_figure(labels, predicted, drawn),
        alt=f"Confusion matrix of {counted(len(names), 'class')}: {percent(float((labels == predicted).mean()))} are on the diagonal.",
        caption=f"Counted over {counted(len(labels), 'image')}. Each row is normalised by its true class; colours have a square-root scale.",
        names=names,
    )
    bars = embed_plot(out / "classes.png", lambda: classes_figure(counts, drawn), alt="Recall and precision by class.", names=names)
    return html.section("Confusion", html.Beside([[plot] for plot in (matrix, bars) if plot is not None]))


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f"95\u00a0% interval {shown(interval)}\u00a0%"
