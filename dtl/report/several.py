"""The page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtl.errors import UserError
from dtl.report import html
from dtl.report.compare import Comparison, Course, Group, compare, compare_figure, differences
from dtl.report.html import Cell
from dtl.report.record import best_of, read_run
from dtl.report.single import PAGE, duration, embed_plot, footer, prepare_folder, write_page
from dtl.report.style import NARROW, percent
from dtl.runs.folder import never_began, why_none_began
from dtl.text import Log

_MOST_COLUMNS = 8  # of a table of differences


def make_comparison(run_folders: Sequence[str | Path], *, out: str | Path | None, log: Log) -> Path:
    """See `dtl.report.make_comparison`."""
    # `dtl report runs/*` names these too.
    never = [folder for folder in run_folders if never_began(folder)] if len(run_folders) > 1 else []
    for folder in never:
        log(f"left out of the comparison: {folder}: {why_none_began(folder)}")
    records = [read_run(folder) for folder in run_folders if folder not in never]
    if not records:
        raise UserError("nothing to compare: none of these runs has started training")
    twice = sorted({str(record.path) for record in records if [other.path.resolve() for other in records].count(record.path.resolve()) > 1})
    if twice:
        raise UserError(f"{twice[0]} is given twice")
    folder = _place(out)
    comparison = compare(records)
    prepare_folder(folder)
    left_out = [
        *comparison.left_out,
        *(f"{record.name}: {words}" for record in records for words in record.missing if "model folder" not in words),
    ]
    for words in left_out:
        log(f"left out of the comparison: {words}")
    alt = "Top-1 and loss on validation images of " + "; ".join(f"{group.name}, best top-1 {_best(group.courses)}" for group in comparison.groups)
    caption = (
        "With several seeds, the line is their mean and the band spans the lowest to the highest." if any(len(g.courses) > 1 for g in comparison.groups) else ""
    )
    plot = embed_plot(
        folder / "compare.png",
        lambda: compare_figure(comparison),
        alt=alt,
        caption=caption,
        narrow=lambda: compare_figure(comparison, NARROW),
    )
    sections = [
        html.section("Curves", plot),
        html.section("Results", *_results(comparison)),
        _differences(comparison.groups),
        html.section("Left out", html.Bullets(left_out)) if left_out else None,
    ]
    title = " · ".join(group.name for group in comparison.groups) if len(comparison.groups) <= 4 else f"{len(records)} runs"
    lead = [html.Headline([(_best(group.courses), group.name) for group in comparison.groups[:6]]), html.Text("Best top-1 on validation images.", soft=True)]
    return write_page(folder, html.page(title, lead, [part for part in sections if part is not None], footer=footer()))


def _place(out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    folder = Path("comparison")
    if folder.exists() and not (folder / PAGE).is_file():
        raise UserError(f"{folder} exists already and is not a comparison made by dtl; choose another folder with --out")
    return folder


def _best(courses: Sequence[Course]) -> str:
    """Mean and standard deviation of the runs' best top1."""
    values = np.asarray([course.best for course in courses])
    if len(values) == 1:
        return percent(float(values[0]), 2)
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}\u00a0%"


def _results(comparison: Comparison) -> list[html.Block]:
    rows = []
    for group in comparison.groups:
        for course in group.courses:
            best = best_of(course.top1, course.loss, lowest=False)
            seconds = sum(phase.row.get("seconds") or 0.0 for phase in course.record.phases)
            rows.append([
                Cell(course.record.name),
                Cell("–" if course.record.config is None else str(course.record.config.run.seed), number=True),
                Cell(percent(course.best, 2), number=True),
                Cell("–" if best is None else f"{course.x[best]:.4g}", number=True),
                Cell(percent(float(course.top1[-1]), 2), number=True),
                Cell(f"{np.nanmin(course.loss):.4f}" if np.isfinite(course.loss).any() else "–", number=True),
                Cell(f"{course.record.last_step:,}", number=True),
                Cell(duration(seconds) if seconds else "–", number=True),
            ])  # fmt: skip
    columns = ["run", "seed", "best top-1", f"at {comparison.unit}", "last top-1", "lowest loss", "total steps", "total time"]
    several = [group for group in comparison.groups if len(group.courses) > 1]
    groups = html.Bullets([f"{group.name}: best top-1 {_best(group.courses)} (mean and standard deviation of {len(group.courses)} seeds)" for group in several])
    return [html.Table(columns, rows), *([groups] if several else [])]


def _differences(groups: Sequence[Group]) -> html.Section:
    if len(groups) > _MOST_COLUMNS:
        return html.section("Settings that differ", html.Text(f"Not listed for more than {_MOST_COLUMNS} curves.", soft=True))
    rows = [[Cell(name), *(Cell(value) for value in values)] for name, values in differences(groups)]
    return html.section(
        "Settings that differ",
        html.Table(["setting", *(group.name for group in groups)], rows) if rows else html.Text("Only the names differ."),
    )
