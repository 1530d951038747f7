"""The picture of a learning rate range test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtl.report.style import BLUE, GREY, VERMILION, lines_on, new_figure, plain, save


def save_lr_plot(path: Path, *, phase: str, lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float | None) -> None:
    """Loss against the logarithm of the rate, with the suggested one marked; a PNG."""
    with plain():
        figure = new_figure(640, 400)
        axes = figure.subplots()
        axes.plot(lrs, losses, color=GREY, linewidth=0.7, alpha=0.6, label="each step")
        axes.plot(lrs, smoothed, color=BLUE, label="smoothed")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        if smoothed:
            low, high = min(smoothed), max(smoothed[: max(1, len(smoothed) // 2)])
            margin = 0.15 * max(high - low, 1e-6)
            axes.set_ylim(low - margin, high + 2 * margin)
        if suggestion is not None:
            axes.axvline(suggestion, color=VERMILION, linewidth=1.0)
            axes.annotate(f" {suggestion:.2g}", (suggestion, axes.get_ylim()[1]), va="top", color=VERMILION)
        axes.set_title(f"Range test of phase {phase}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.legend()
        lines_on(axes)
        save(figure, path)
