"""The course of one run: loss, top1 and learning rate over steps, epochs on top, borders of phases marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtl.optim.schedule import lr_at, schedule_of
from dtl.report.record import Column, PhaseRecord, RunRecord
from dtl.report.style import BLUE, FAINT, GREY, VERMILION, WIDE, as_percent, lines_on, new_figure, percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 600
_MOST_MARKERS = 40
_MOST_MARKED = 40
"""Phases. Of more the borders, names and best evaluations would cover the curves: only the last phase's best is marked, whose weights the run delivers."""
_EPOCH_TICKS = 7
# Learning rates that differ by more than this between phases need a logarithmic axis to be seen.
_LOG_LR = 20.0


def curves_figure(record: RunRecord, width: int = WIDE) -> Figure | None:
    """None where history holds nothing to draw. Draw and save it inside `style.plain()`."""
    if not any(len(phase.train["step"]) or len(phase.val["step"]) for phase in record.phases):
        return None
    figure = new_figure(width, 560, fit=False)
    figure.subplots_adjust(left=54 / width, right=1 - 12 / width, top=1 - 40 / 560, bottom=44 / 560, hspace=0.22)
    loss, top1, lr = figure.subplots(3, 1, sharex=True, height_ratios=[5, 5, 2.6])
    phases = record.phases
    _lines(loss, [thinned(phase.train["step"], phase.train["loss"]) for phase in phases], BLUE, "train")
    for axes, metric in ((loss, "loss"), (top1, "top1")):
        _lines(axes, [thinned(phase.course["step"], phase.course[metric]) for phase in phases], VERMILION, "validation", dots=_MOST_MARKERS, clip_on=False)
    for phase in phases if len(phases) <= _MOST_MARKED else phases[-1:]:
        _mark_kept(top1, phase, record.monitor, record.last_step)
    rates = [learning_rates(record, phase) for phase in phases]
    _lines(lr, [(steps, values) for steps, values, in_stairs in rates if not in_stairs], GREY)
    _lines(lr, [(steps, values) for steps, values, in_stairs in rates if in_stairs], GREY, drawstyle="steps-pre")
    loss.set_title("Loss", pad=17)
    _title(top1, "Top-1 on validation images (◇ kept)")
    _title(lr, "Learning rate")
    _limit_loss(loss, record.phases)
    as_percent(top1)
    # Room for the numbers of what is kept above, and for the phases' names below.
    low, high = top1.dataLim.intervaly if top1.lines else (0.0, 1.0)
    height = max(high - low, 0.02)
    top1.set_ylim(low - 0.17 * height, high + 0.17 * height)
    _lr_scale(lr, [values for _, values, _ in rates])
    for axes in (loss, top1, lr):
        lines_on(axes)
        axes.margins(x=0.01)
    lr.set_xlabel("step")
    lr.set_xlim(0, max(1, record.last_step))
    _legend(loss)
    _mark_phases([loss, top1, lr], record, letters=0.143 * width)
    _epoch_axis(loss, record)
    return figure


def thinned(x: Column, y: Column, most: int = _MOST_POINTS) -> tuple[Column, Column]:
    """At most `most` points: means of equal stretches, so that long runs stay readable and small."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def epoch_marks(record: RunRecord) -> list[tuple[int, int]]:
    """(step, epoch) where each epoch begins, at most a handful of them; empty where epochs are not known."""
    per_epoch = record.steps_per_epoch
    if not per_epoch:
        return []
    spans = []
    for phase in record.phases:
        first = record.first_epoch(phase)
        if first is not None:
            spans.append((phase.first_step, first, -(-phase.num_steps // per_epoch)))
    if not spans:
        return []
    # Sparse marks are chosen before they are made: a run may have a million epochs.
    every = _nice_step(sum(count for _, _, count in spans) / _EPOCH_TICKS)
    marks = []
    for step, first, count in spans:
        for epoch in range(first + -first % every, first + count, every):
            marks.append((step + (epoch - first) * per_epoch, epoch))
    return marks


def _nice_step(least: float) -> int:
    step = 1
    while step < least:
        step = next(candidate for candidate in (step * 2, step * 5 // 2, step * 5) if str(candidate)[0] in "125" and candidate > step)
    return step


def _lines(axes: Axes, pieces: Sequence[tuple[Column, Column]], color: str, label: str = "", *, dots: int = 1, **style: Any) -> None:
    """Lines that do not touch, one of each phase; of at most `dots` points with a dot at each. As one line or two, for a phase may be a step: 1,000 phases
    took a minute otherwise."""
    for few in (False, True):
        chosen = [piece for piece in pieces if len(piece[0]) and (len(piece[0]) <= dots) == few]
        if chosen:
            x, y = (np.concatenate([part for piece in chosen for part in (piece[axis], [np.nan])])[:-1] for axis in (0, 1))
            axes.plot(x, y, color=color, label=label or None, marker="o" if few else None, **style)


def learning_rates(record: RunRecord, phase: PhaseRecord) -> tuple[Column, Column, bool]:
    """(steps, learning rate of the step that ends there, whether it holds since the step before), some hundred of them at most.

    By the phase's schedule, for history has every tenth step only; as history has them where that does not give its numbers (a phase that was made
    longer, or a config that was edited).
    """
    steps, logged = phase.train["step"], phase.train["lr"]
    settings = record.config.phases.get(phase.name) if record.config is not None else None
    known = np.isfinite(logged)
    if settings is not None and known.any():
        per_epoch = record.steps_per_epoch or 1
        schedule, num_steps = schedule_of(settings, per_epoch), settings.num_steps(per_epoch)

        def rates(at: Column) -> Column:
            done = (at - 1 - phase.first_step).astype(np.int64).clip(min=0).tolist()
            return np.array([lr_at(step, schedule=schedule, num_steps=num_steps, base_lr=settings.lr) for step in done])

        if np.allclose(rates(steps[known]), logged[known], rtol=1e-6, atol=1e-12):
            at = phase.first_step + np.unique(np.linspace(1, phase.num_steps, min(_MOST_POINTS, phase.num_steps)).round())
            return np.append(phase.first_step, at), np.append(rates(at[:1]), rates(at)), True
    # Between two lines of the log stairs do not slope.
    if settings is not None and settings.schedule == "step" and 0 < len(steps) <= _MOST_POINTS:
        return np.append(phase.first_step, steps), np.append(logged[0], logged), True
    return *thinned(steps, logged), False


def _mark_kept(axes: Axes, phase: PhaseRecord, monitor: str, last_step: int) -> None:
    best = phase.kept(monitor)
    if best is None or not np.isfinite(phase.val["top1"][best]):
        return
    step, value = phase.val["step"][best], phase.val["top1"][best]
    axes.plot(step, value, marker="D", markersize=8, markerfacecolor="none", markeredgecolor=VERMILION, markeredgewidth=1.1, clip_on=False)
    edge = 0.06 * last_step  # a number at the end of its phase must not cross the border
    side = "right" if step > phase.last_step - edge else "left" if step < phase.first_step + edge else "center"
    axes.annotate(percent(value), (step, value), xytext=(0, 7), textcoords="offset points", ha=side, va="bottom", fontsize=8, color=VERMILION)


def _limit_loss(axes: Axes, phases: list[PhaseRecord]) -> None:
    """A few values far above all others (the first steps, usually) would press the rest flat: they leave the plot, and it says so."""
    values = np.concatenate([values for phase in phases for values in (phase.train["loss"], phase.course["loss"])])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    usual = float(np.quantile(values, 0.97))
    if values.max() > 3 * usual > 0:
        above = int((values > 1.3 * usual).sum())
        axes.set_ylim(top=1.3 * usual)
        axes.text(0.01, 0.97, f"↑ {above} higher, up to {values.max():.3g}", transform=axes.transAxes, va="top", fontsize=7.5, color=GREY)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]) if values.min() >= 0 else None)


def _lr_scale(axes: Axes, rates: list[Column]) -> None:
    peaks = [float(values.max()) for values in rates if len(values)]
    peaks = [peak for peak in peaks if peak > 0]
    if peaks and max(peaks) / min(peaks) > _LOG_LR:
        axes.set_yscale("log")
        axes.set_ylim(min(peaks) / 100, max(peaks) * 2)
    else:
        axes.set_ylim(bottom=0)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, pad=5)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in reversed(list(zip(handles, labels)))}
    names = [name for name in ("train", "validation") if name in first]
    axes.legend([first[name] for name in names], names, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, borderaxespad=1.6)


def _mark_phases(panels: list[Axes], record: RunRecord, *, letters: float) -> None:
    """`letters`: how many fit on the whole width."""
    if not 2 <= len(record.phases) <= _MOST_MARKED:
        return
    for phase in record.phases[1:]:
        for axes in panels:
            axes.axvline(phase.first_step, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    total = max(1, record.last_step)
    for phase in record.phases:
        room = int(letters * phase.num_steps / total)
        if room >= 3:
            panels[1].text(
                (phase.first_step + phase.last_step) / 2, 0.015, shorten(phase.name, room), transform=panels[1].get_xaxis_transform(),
                ha="center", va="bottom", fontsize=8, color=GREY,
            )  # fmt: skip


def _epoch_axis(axes: Axes, record: RunRecord) -> None:
    marks = epoch_marks(record)
    if not marks:
        return
    top = axes.secondary_xaxis("top")
    top.set_xticks([step for step, _ in marks], [str(epoch) for _, epoch in marks])
    top.tick_params(length=2.5, color=FAINT, pad=1)
    top.spines["top"].set_visible(False)
    axes.annotate("epoch", (1, 1), xycoords="axes fraction", xytext=(0, 18), textcoords="offset points", ha="right", fontsize=8, color=GREY)
