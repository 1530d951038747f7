"""Several runs in one plot: validation top1 and loss over the epochs that learned the same task.

Runs that differ in nothing but their seed are one curve: the mean, in a band from the lowest to the highest. That holds as well where
each seed has a list of images or a source of weights of its own, which has the seed as a number in its name (`few0.csv`, `runs/pretext-s0`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtl.errors import UserError
from dtl.intervals import Interval, wilson
from dtl.report.record import Column, RunRecord, best_of
from dtl.report.style import BLACK, CYCLE, MARKERS, WIDE, as_percent, lines_on, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_RUNS = 60
_MOST_MARKERS = 30
# Settings that cannot change a result, or only name things; seeds have a column of their own.
_NO_DIFFERENCE = (
    "run.name",
    "run.seed",
    "run.dir",
    "run.resume",
    "run.device",
    "tracking.",
    "checkpoint.",
    "data.workers",
    "data.cache_dir",
    "data.cache_shared",
)
# Settings that may name a file or a run of each seed.
_NAMED_BY_SEED = ("data.train", "transfer.source")


@dataclass(frozen=True)
class Course:
    """The evaluations of one run in the phases that are compared. `x` in epochs or steps since the first of these phases began."""

    record: RunRecord
    x: Column
    epoch: Column
    """As the run counts them, over all of its phases, from 0."""
    top1: Column
    loss: Column
    num_samples: Column

    @property
    def best(self) -> float:
        return float(np.nanmax(self.top1)) if np.isfinite(self.top1).any() else float("nan")

    @property
    def best_epoch(self) -> int | None:
        place = best_of(self.top1, self.loss, lowest=False)
        return None if place is None else int(self.epoch[place])

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of `best`; None where images come in groups, which history does not know."""
        place = best_of(self.top1, self.loss, lowest=False)
        if self.record.phases[-1].task != "classify" or self.record.is_grouped:
            return None
        return None if place is None else wilson(float(self.top1[place]), float(self.num_samples[place]))

    @property
    def lowest_loss(self) -> float:
        return float(np.nanmin(self.loss)) if np.isfinite(self.loss).any() else float("nan")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; one run, usually."""

    name: str
    courses: tuple[Course, ...]


@dataclass(frozen=True)
class Comparison:
    groups: tuple[Group, ...]
    unit: str
    """epoch or step"""
    task: str
    left_out: tuple[str, ...]
    """What is not in the plot, in words."""


def compare(records: Sequence[RunRecord]) -> Comparison:
    """UserError where there is nothing to compare."""
    if len(records) > MOST_RUNS:
        raise UserError(f"{len(records)} runs are more than one plot can show; give at most {MOST_RUNS}")
    tasks = {phase.task for record in records for phase in record.phases if len(phase.val["step"])}
    if not tasks:
        raise UserError(f"nothing to compare: {', '.join(str(record.path) for record in records)} have no evaluation in their history")
    task = "classify" if "classify" in tasks else sorted(tasks)[0]
    unit = "epoch" if all(record.steps_per_epoch for record in records) else "step"
    courses = {record.path: _course(record, task, unit) for record in records}
    left_out = [f"{record.name} has no evaluation of the task {task}" for record in records if courses[record.path] is None]
    pretext = sorted({f"{record.name}: {phase.name}" for record in records for phase in record.phases if phase.task != task and courses[record.path]})
    if pretext:
        left_out.append(f"phases with another task are not drawn ({', '.join(pretext)}); {unit}s are counted from the first phase that is drawn")
    groups = _grouped([course for record in records if (course := courses[record.path]) is not None])
    names = _group_names([[course.record.name for course in members] for members in groups])
    return Comparison(tuple(Group(name, tuple(members)) for name, members in zip(names, groups)), unit, task, tuple(left_out))


def compare_figure(comparison: Comparison, width: int = WIDE) -> Figure:
    """Draw and save it inside `style.plain()`."""
    rows = len(comparison.groups)
    figure = new_figure(width, 500 + 17 * min(rows, 20))
    top1, loss = figure.subplots(2, 1, sharex=True)
    for place, group in enumerate(comparison.groups):
        color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        style = ("-", "--", ":")[place // len(CYCLE) % 3]
        label = shorten(group.name, 44) + (f" (mean of {len(group.courses)})" if len(group.courses) > 1 else "")
        _draw(top1, group, "top1", color=color, marker=marker, style=style, label=label)
        _draw(loss, group, "loss", color=color, marker=marker, style=style, label="")
    top1.set_title("Top-1 on validation images")
    loss.set_title("Loss on validation images")
    as_percent(top1)
    for axes in (top1, loss):
        lines_on(axes)
    loss.set_xlabel(f"{comparison.unit}s" + (" of classification" if comparison.task == "classify" else " of the pretext task"))
    loss.set_xlim(left=0)
    figure.legend(loc="outside lower left", alignment="left", labelcolor=BLACK)
    return figure


def differences(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in each group) for every setting that differs; None where a group's runs have no such setting.

    Of several seeds with files of their own it is the name that they share, `few{seed}.csv`.
    """
    records = [group.courses[0].record for group in groups]
    settings = [_shared_settings(group) for group in groups]
    names = sorted({name for values in settings for name in values})
    rows = []
    for name in names:
        if name.startswith(_NO_DIFFERENCE):
            continue
        values = [found.get(name) for found in settings]
        if len({json.dumps(value) for value in values}) > 1:
            rows.append((name, values))
    return _without_whole_sections(rows, records)


def _without_whole_sections(rows: list[tuple[str, list[Any]]], records: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """A phase that some runs do not have is one line, not thirty; of pretrained weights that some do not have, only their source."""
    if not all(record.config is not None and record.config.transfer for record in records):
        rows = [row for row in rows if not row[0].startswith("transfer.") or row[0] == "transfer.source"]
    partial: list[tuple[str, list[Any]]] = []
    for name in dict.fromkeys(name for record in records if record.config for name in record.config.phases):
        has = [record.config is not None and name in record.config.phases for record in records]
        if not all(has):
            partial.append((f"phases.{name}", ["yes" if found else None for found in has]))
    skip = tuple(f"{name}." for name, _ in partial)
    return [*partial, *(row for row in rows if not (skip and row[0].startswith(skip)))]


def _course(record: RunRecord, task: str, unit: str) -> Course | None:
    phases = [phase for phase in record.phases if phase.task == task and len(phase.val["step"])]
    if not phases:
        return None
    per_x = (record.steps_per_epoch or 1) if unit == "epoch" else 1
    columns = {name: np.concatenate([phase.course[name] for phase in phases]) for name in ("step", "epoch", "top1", "loss", "num_samples")}
    return Course(record, (columns["step"] - phases[0].first_step) / per_x, columns["epoch"], columns["top1"], columns["loss"], columns["num_samples"])


def _draw(axes: Axes, group: Group, name: str, *, color: str, marker: str, style: str, label: str) -> None:
    first = group.courses[0]
    x, y = first.x, getattr(first, name)
    if len(group.courses) > 1:
        x = np.asarray(sorted(set.intersection(*(set(course.x.tolist()) for course in group.courses))))
        table = np.stack([getattr(course, name)[np.searchsorted(course.x, x)] for course in group.courses]) if len(x) else np.empty((1, 0))
        y = table.mean(axis=0)
        axes.fill_between(x, table.min(axis=0), table.max(axis=0), color=color, alpha=0.16, linewidth=0)
    if not len(x):
        return
    shown = marker if len(x) <= _MOST_MARKERS else None
    axes.plot(x, y, color=color, marker=shown, linestyle=style, label=label or None, clip_on=False)


def _grouped(courses: Sequence[Course]) -> list[list[Course]]:
    """Courses whose runs differ in their seed only, or in it and in the names that hold it."""
    groups: list[list[Course]] = []
    place: dict[str, int] = {}
    for course in courses:
        keys = _identities(course.record)
        at = next((place[key] for key in keys if key in place), len(groups))
        if at == len(groups):
            groups.append([])
        groups[at].append(course)
        place.update((key, at) for key in keys)
    return groups


def _identities(record: RunRecord) -> tuple[str, ...]:
    """Equal for runs that differ in their seed only: as the settings are, and with the seed (as the last number that is it) taken out of
    the names of data and sources. The path of a run without a config."""
    if record.config is None:
        return (str(record.path.resolve()),)
    values = {name: value for name, value in record.settings.items() if not name.startswith(_NO_DIFFERENCE)}
    return tuple(json.dumps({**values, **changed}, sort_keys=True) for changed in ({}, _named_by_seed(values, record.config.run.seed)))


def _named_by_seed(values: dict[str, Any], seed: int) -> dict[str, str]:
    last = re.compile(rf"(.*)(?<!\d){seed}(?!\d)", re.DOTALL)
    return {name: last.sub(r"\1{seed}", values[name], count=1) for name in _NAMED_BY_SEED if isinstance(values.get(name), str)}


def _shared_settings(group: Group) -> dict[str, Any]:
    first = group.courses[0].record
    if first.config is None:
        return {}
    values, others = first.settings, [course.record.settings for course in group.courses[1:] if course.record.config is not None]
    named = _named_by_seed(values, first.config.run.seed)
    return {**values, **{name: name_of for name, name_of in named.items() if any(other.get(name) != values[name] for other in others)}}


def _group_names(names: Sequence[Sequence[str]]) -> list[str]:
    """What the runs of a group have in common in their names, without a dangling `-s` or `_seed`; all names where that is not clear."""
    found = []
    for members in names:
        common = members[0]
        for other in members[1:]:
            while not other.startswith(common):
                common = common[:-1]
        if len(members) > 1:
            common = re.sub(r"[-_. ]*(seed|s)?[-_. ]*$", "", common) or ", ".join(members)
        found.append(common)
    return [name if found.count(name) == 1 else ", ".join(members) for name, members in zip(found, names)]


def shown(value: Any) -> str:
    """A setting for people; a dash for none."""
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else value if isinstance(value, str) else json.dumps(value)
