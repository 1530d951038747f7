"""The page that compares several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtl import intervals
from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.report import html
from dtl.report.compare import Course, Group, compare, compare_figure, differences, shown
from dtl.report.fonts import without_font
from dtl.report.html import Cell
from dtl.report.record import RunRecord, read_run
from dtl.report.single import PAGE, duration, embed_plot, footer, missing_fonts, prepare_folder, top1_interval, write_page
from dtl.report.style import NARROW, percent
from dtl.runs.folder import never_began, why_none_began
from dtl.runs.predictions import read_predictions, recorded_file
from dtl.text import Log, counted, csv_line

_MOST_COLUMNS, _MOST_SETTINGS = 8, 8  # runs, and settings, side by side


def make_comparison(run_folders: Sequence[str | Path], *, out: str | Path | None, table_csv: str | Path | None = None, log: Log) -> Path:
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
    rows = differences(comparison.groups)
    names, results = [name for name, _ in rows], _results(comparison.groups, rows)
    if table_csv is not None:
        _write_csv(table_csv, results, names)
    prepare_folder(folder)
    left_out = [
        *comparison.left_out,
        *(f"{record.name}: {words}" for record in records for words in record.missing if "model folder" not in words),
    ]
    group_names = [group.name for group in comparison.groups]
    if scripts := without_font(group_names):
        left_out.append(missing_fonts(scripts))
    for words in left_out:
        log(f"left out of the comparison: {words}")
    paired = _same_images(records)
    if paired:
        log(paired)
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
        names=group_names,
    )
    sections = [
        html.section("Curves", plot),
        html.section("Results", *_table(results, names, comparison.groups)),
        html.section("On the same images", html.Text(paired)) if paired else None,
        _differences(comparison.groups, rows),
        html.section("Left out", html.Bullets(left_out)) if left_out else None,
    ]
    title = " · ".join(group.name for group in comparison.groups) if len(comparison.groups) <= 4 else f"{len(records)} runs"
    best = sorted(comparison.groups, key=lambda group: -np.nan_to_num(np.mean([course.best for course in group.courses]), nan=-1.0))[:6]
    lead = [html.Headline([(_best(group.courses), group.name) for group in best]), html.Text("Best top-1 on validation images.", soft=True)]
    return write_page(folder, html.page(title, lead, [part for part in sections if part is not None], footer=footer()))


def _place(out: str | Path | None) -> Path:
    if out is not None:
        return user_path(out)
    folder = Path("comparison")
    if folder.exists() and not (folder / PAGE).is_file():
        raise UserError(f"{folder} exists already and is not a comparison made by dtl; choose another folder with --out")
    return folder


def _best(courses: Sequence[Course]) -> str:
    """The best top1 of a run, or of several their mean and range."""
    values = np.asarray([course.best for course in courses])
    if len(values) == 1:
        return percent(float(values[0]), 2)
    return f"{100 * values.mean():.2f}\u00a0% ({100 * values.min():.2f} to {100 * values.max():.2f})"


def _same_images(records: Sequence[RunRecord]) -> str:
    """What McNemar's test says about the delivered weights of two runs, or why it cannot be asked; nothing of more runs."""
    if len(records) != 2:
        return ""
    first, second = records
    try:
        return f"{first.name} against {second.name}, {_paired(first, second)}"
    except UserError as error:
        return f"{first.name} and {second.name} are not compared image by image: {error}"


def _paired(first: RunRecord, second: RunRecord) -> str:
    kept = []
    for record in (first, second):
        if record.is_grouped:
            raise UserError(f"{record.name} has groups of images, which the test takes for independent")
        facts = None if record.model is None else recorded_file(record.model.made_by, str(record.path / "model" / "model.json"))
        found = None if record.model is None or facts is None else read_predictions(record.path, facts, len(record.model.classes))
        if record.model is None or facts is None or found is None:
            raise UserError(f"{record.name} kept no predictions (predictions.npy)")
        kept.append((record.model.classes, facts.data, found))
    (classes, data, a), (other_classes, other_data, b) = kept
    if data != other_data or classes != other_classes:
        raise UserError("they were evaluated on other images or classes")
    return f"the same {counted(len(a), 'validation image')}: {a.against(b)} (McNemar's exact test)"


@dataclass(frozen=True)
class _Result:
    """One run's row of the table."""

    course: Course
    settings: tuple[Any, ...]
    """Its values of the settings that differ."""

    @property
    def seed(self) -> int | None:
        return None if self.course.record.config is None else self.course.record.config.run.seed

    @property
    def test_top1(self) -> float | None:
        test = self.course.record.test
        return None if test is None else float(test["top1"])

    @property
    def test_interval(self) -> intervals.Interval | None:
        test = self.course.record.test
        return None if test is None else top1_interval("classify", test)

    @property
    def seconds(self) -> float:
        return sum(phase.row.get("seconds") or 0.0 for phase in self.course.record.phases)


def _results(groups: Sequence[Group], rows: Sequence[tuple[str, list[Any]]]) -> list[_Result]:
    """All runs, the best top1 first; among equals the lower loss."""
    found = [_Result(course, tuple(values[place] for _, values in rows)) for place, group in enumerate(groups) for course in group.courses]
    return sorted(found, key=lambda one: (math.isnan(one.course.best), -one.course.best, one.course.lowest_loss))


def _table(results: Sequence[_Result], names: Sequence[str], groups: Sequence[Group]) -> list[html.Block]:
    rows = []
    tested = any(one.test_top1 is not None for one in results)
    for one in results:
        course, epoch = one.course, one.course.best_epoch
        rows.append([
            Cell(course.record.name),
            Cell("–" if one.seed is None else str(one.seed), number=True),
            *(Cell(shown(value), number=_is_number(value)) for value in one.settings[:_MOST_SETTINGS]),
            Cell(percent(course.best, 2), number=True),
            Cell(intervals.shown(course.interval) or "–", number=True),
            *([] if not tested else [Cell("–" if one.test_top1 is None else percent(one.test_top1, 2), number=True)]),
            *([] if not tested else [Cell(intervals.shown(one.test_interval) or "–", number=True)]),
            Cell("–" if epoch is None else str(epoch), number=True),
            Cell(percent(float(course.top1[-1]), 2), number=True),
            Cell(f"{course.lowest_loss:.4f}" if math.isfinite(course.lowest_loss) else "–", number=True),
            Cell(f"{course.record.last_step:,}", number=True),
            Cell(duration(one.seconds) if one.seconds else "–", number=True),
        ])  # fmt: skip
    columns = [
        "run",
        "seed",
        *names[:_MOST_SETTINGS],
        "best top\u20111",
        "95\u00a0% interval",
        *(["test top\u20111", "95\u00a0% interval"] if tested else []),
        "in epoch",
        "last top\u20111",
        "lowest loss",
        "total steps",
        "total time",
    ]
    blocks: list[html.Block] = [html.Table(columns, rows)]
    if not names:
        blocks.append(html.Text("Only the names and seeds differ.", soft=True))
    if len(names) > _MOST_SETTINGS:
        more = f"{len(names)} settings differ, and {_MOST_SETTINGS} of them have a column here; all have one in the file of `--table-csv FILE`."
        blocks.append(html.Text(more, soft=True))
    several = [group for group in groups if len(group.courses) > 1]
    if several:
        words = [f"{group.name}: best top-1 {_best(group.courses)} (mean and range of {len(group.courses)} seeds)" for group in several]
        blocks.append(html.Bullets(words))
    return blocks


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differences(groups: Sequence[Group], rows: Sequence[tuple[str, list[Any]]]) -> html.Section | None:
    """Settings as rows, where they are too many for columns, and the runs few."""
    if len(rows) <= _MOST_SETTINGS or len(groups) > _MOST_COLUMNS:
        return None
    cells = [[Cell(name), *(Cell(shown(value)) for value in values)] for name, values in rows]
    return html.section("Settings that differ", html.Table(["setting", *(group.name for group in groups)], cells))


def _write_csv(file: str | Path, results: Sequence[_Result], names: Sequence[str]) -> None:
    tested = any(one.test_top1 is not None for one in results)
    columns = ["run", "seed", *names, "best_top1", "best_epoch", "last_top1", "lowest_loss", "steps", "seconds", *(["test_top1"] if tested else [])]
    lines = [csv_line(columns)]
    for one in results:
        course = one.course
        settings = [value if _is_number(value) or isinstance(value, str | None) else json.dumps(value) for value in one.settings]
        numbers = [
            course.best,
            course.best_epoch,
            float(course.top1[-1]),
            course.lowest_loss,
            course.record.last_step,
            one.seconds or None,
            *([one.test_top1] if tested else []),
        ]
        lines.append(csv_line([course.record.name, one.seed, *settings, *numbers]))
    try:
        write_whole(user_path(file), lambda out: out.write("".join(lines).encode("utf-8", "surrogateescape")))
    except OSError as error:
        raise UserError(f"--table-csv {file}: cannot be written: {error.strerror or error}") from error
