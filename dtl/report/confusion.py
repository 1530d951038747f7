"""Which class was taken for which, and how each class fares, as plots and as short tables. K classes, n samples.

Nothing here grows with K x K: with a thousand classes the matrix is drawn in at most 250 x 250 groups of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dtl.report.style import BLUE, GREY, NARROW, VERMILION, as_percent, lines_on, new_figure, percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ints = npt.NDArray[np.int64]
_MOST_NUMBERS, MOST_NAMES, _MOST_CELLS, MOST_BARS = 20, 40, 250, 30


@dataclass(frozen=True)
class ClassNumbers:
    """Exact counts over the samples looked at. All [K]."""

    samples: Ints
    predicted: Ints
    correct: Ints

    @classmethod
    def count(cls, labels: Ints, predicted: Ints, num_classes: int) -> ClassNumbers:
        hits = labels[labels == predicted]
        return cls(*(np.bincount(found, minlength=num_classes) for found in (labels, predicted, hits)))

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Share of a class's samples that were found; NaN for a class without samples."""
        return _share(self.correct, self.samples)

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Share right among those taken for the class; NaN for one never predicted."""
        return _share(self.correct, self.predicted)


def confusion_figure(labels: Ints, predicted: Ints, names: Sequence[str]) -> Figure:
    """Rows are the true classes, each row in shares of its samples. Draw and save it inside `style.plain()`."""
    k = len(names)
    group = -(-k // _MOST_CELLS)
    cells = -(-k // group)
    counts = np.zeros((cells, cells), np.int64)
    np.add.at(counts, (labels // group, predicted // group), 1)
    shares = _share(counts, counts.sum(axis=1, keepdims=True))
    side = NARROW if k <= _MOST_NUMBERS else 620
    figure = new_figure(side, side - 20)
    axes = figure.subplots()
    # The square root shows the rare mistakes beside the full diagonal.
    axes.imshow(np.sqrt(np.nan_to_num(shares)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    _name_classes(axes, names, k, group)
    if k <= _MOST_NUMBERS:
        for row, column in np.argwhere(counts).tolist():
            ink = "white" if shares[row, column] > 0.36 else "#1a1a1a"
            size = 8.2 if k <= 12 else 6.6
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
    return figure


def classes_figure(numbers: ClassNumbers, names: Sequence[str]) -> Figure | None:
    """Bars of recall, dots of precision, the hardest classes first (and only these, where there are many)."""
    order = hardest_classes(numbers)[:MOST_BARS]
    if not len(order):
        return None
    figure = new_figure(NARROW, 84 + 21 * len(order))
    axes = figure.subplots()
    places = np.arange(len(order))
    recall, precision = numbers.recall[order], numbers.precision[order]
    axes.barh(places, recall, color=BLUE, height=0.62, label="recall")
    axes.plot(
        precision,
        places,
        linestyle="none",
        marker="D",
        markersize=5,
        color=VERMILION,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label="precision",
        clip_on=False,
        zorder=4,
    )
    axes.set_yticks(places, [f"{shorten(names[c], 22)} ({numbers.samples[c]:,})" for c in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.0)
    for place, value in enumerate(recall.tolist()):
        axes.text(1.04, place, percent(value, 0), va="center", ha="left", fontsize=7.6, color=GREY)
    as_percent(axes, "x")
    lines_on(axes, "x")
    axes.spines["left"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=2)
    return figure


def hardest_classes(numbers: ClassNumbers) -> Ints:
    """Class numbers by recall, the lowest first; classes without samples are left out."""
    recall = numbers.recall
    order = np.lexsort((np.arange(len(recall)), recall))
    return order[np.isfinite(recall[order])].astype(np.int64)


def confused_pairs(labels: Ints, predicted: Ints, num_classes: int, most: int = 12) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the pairs most often confused; never a K x K table."""
    wrong = labels != predicted
    pairs, counts = np.unique(labels[wrong] * num_classes + predicted[wrong], return_counts=True)
    order = np.lexsort((pairs, -counts))[:most]
    return [(int(pairs[i]) // num_classes, int(pairs[i]) % num_classes, int(counts[i])) for i in order]


def _name_classes(axes: Axes, names: Sequence[str], k: int, group: int) -> None:
    if k <= MOST_NAMES:
        short = [shorten(name, 18) for name in names]
        upright = k <= _MOST_NUMBERS and max(map(len, short), default=0) <= 4
        axes.set_xticks(range(k), short, rotation=0 if upright else 90)
        axes.set_yticks(range(k), short)
    else:
        from matplotlib.ticker import MaxNLocator

        marks = [mark for mark in MaxNLocator(6, integer=True).tick_values(0, k - 1) if 0 <= mark < k]
        for setter in (axes.set_xticks, axes.set_yticks):
            setter([mark / group for mark in marks], [f"{mark:,.0f}" for mark in marks])


def _share(part: Ints, whole: Ints) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


@dataclass(frozen=True)
class Share:
    """How many images of some kind are right."""

    name: str
    right: int
    total: int


def by_size(sides: npt.NDArray[np.int64], right: npt.NDArray[np.bool_]) -> list[Share]:
    """By the shorter side of the images [n], in up to four parts of about as many images; nothing where all have one size."""
    edges = np.unique(np.quantile(sides, (0.25, 0.5, 0.75), method="lower")) if len(sides) else sides
    part = np.searchsorted(edges, sides, side="left")
    found = []
    for one in np.unique(part):
        mine = part == one
        low, high = int(sides[mine].min()), int(sides[mine].max())
        found.append(Share(f"{low:,} pixels" if low == high else f"{low:,} to {high:,} pixels", int(right[mine].sum()), int(mine.sum())))
    return found if len(found) > 1 else []


def by_group(names: Sequence[str], codes: npt.NDArray[np.int64], right: npt.NDArray[np.bool_], most: int) -> list[Share]:
    """The groups of images [n] with most mistakes; nothing where each image is a group of its own."""
    total, hits = np.bincount(codes, minlength=len(names)), np.bincount(codes, right, minlength=len(names)).astype(np.int64)
    if not len(codes) or total.max() < 2:
        return []
    order = np.lexsort((np.arange(len(names)), -total, hits - total))[:most]
    return [Share(names[code], int(hits[code]), int(total[code])) for code in order if hits[code] < total[code]]
