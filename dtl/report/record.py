"""A run folder, read once: history.jsonl as columns by phase, the config, the status, the transfer, the model's facts.

Whatever is missing is None or empty, and `missing` says so in words; only a folder that is no run at all is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from dtl import files
from dtl.config import Config
from dtl.config.own import StoredConfig, is_own, parse_stored, stored_config
from dtl.errors import UserError
from dtl.files import user_path
from dtl.models.model_json import ModelFacts
from dtl.runs.folder import Status, never_began, why_none_began
from dtl.runs.looks import FOLDS_END, SEARCH_END
from dtl.text import counted, near_run
from dtl.untrusted import Count, Record, Text, json_lines

Column = npt.NDArray[np.float64]
TRAIN_COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "data_wait")
VAL_COLUMNS = ("step", "epoch", "loss", "top1", "top5", "num_samples", "kept", "entering", "blend")
_COLUMNS = {"train": TRAIN_COLUMNS, "val": VAL_COLUMNS, "epoch": ("step", "loss")}
"""By event."""


@dataclass
class PhaseRecord:
    """The events of one phase, in the order of steps. `first_step`: steps of the run that were done before it."""

    name: str
    task: str
    first_step: int
    train: dict[str, Column]
    val: dict[str, Column]
    keep: str = "best"
    """`phases.NAME.keep`"""
    row: dict[str, Any] = field(default_factory=dict)
    """The entry of status.json for the phase once it is finished."""
    epochs: dict[str, Column] = field(default_factory=lambda: {name: np.empty(0) for name in _COLUMNS["epoch"]})
    """Of the epochs that ended: step, and mean training loss."""

    @property
    def last_step(self) -> int:
        steps = [int(events["step"][-1]) for events in (self.train, self.val) if len(events["step"])]
        return max(steps, default=self.first_step)

    @property
    def num_steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def is_blend(self) -> npt.NDArray[np.bool_]:
        """By evaluation: of weights between those that entered the phase and its last ones."""
        return np.isfinite(self.val["blend"]) if "blend" in self.val else np.zeros(len(self.val["step"]), bool)

    @property
    def course(self) -> dict[str, Column]:
        """The evaluations of the phase's steps, for curves over these."""
        return {name: column[~self.is_blend] for name, column in self.val.items()}

    def best(self, metric: str = "top1") -> int | None:
        """The place of the best evaluation in `val`, among equals the one with the lower loss, as the run decided; None where there was none."""
        # A pretext task has no recall of a class of the data: the run judged it by top1.
        known = metric if np.isfinite(self.val.get(metric, np.empty(0))).any() else "top1"
        values = np.where(self.is_blend, np.nan, self.val[known])
        if "entering" in self.val:  # what came before the phase's first step is not its own
            values = np.where(self.val["entering"] == 1, np.nan, values)
        return best_of(values, self.val["loss"], lowest=known == "loss")

    def kept(self, metric: str = "top1") -> int | None:
        """The place in `val` of the weights that the phase kept."""
        kept = np.flatnonzero(self.val["kept"] == 1) if "kept" in self.val else np.empty(0)
        if len(kept):
            return int(kept[-1])
        # An older dtl did not write it.
        return self.best(metric) if self.keep != "last" else len(self.val["step"]) - 1 if len(self.val["step"]) else None

    def train_loss_at(self, step: float) -> float | None:
        """The mean training loss of the epoch of an evaluation, up to it, as the run's own table has it.

        Of a run under way it is known at the ends of epochs; an older dtl wrote down nothing but its last log line.
        """
        if self.row.get("kept_step") == step and self.row.get("train_loss") is not None:
            return float(self.row["train_loss"])
        if np.isfinite(self.epochs["loss"]).any():
            ended = np.flatnonzero(self.epochs["step"] == step)
            return float(self.epochs["loss"][ended[-1]]) if len(ended) else None
        logged = np.flatnonzero(self.train["step"] <= step)
        return float(self.train["loss"][logged[-1]]) if len(logged) else None


def best_of(values: Column, losses: Column, *, lowest: bool) -> int | None:
    """The place of the greatest of `values` (or the lowest), among equals that of the lower loss, then the first; None without a finite one."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return None
    order = np.lexsort((known, losses[known], values[known] if lowest else -values[known]))
    return int(known[order[0]])


class Totals(Record):
    """Of one outcome."""

    tensors: Count = 0
    parameters: Count = 0


class TransferFacts(Record):
    """What the page shows of transfer.json."""

    source: Text
    by: Text
    coverage: float
    totals: dict[Text, Totals] = field(default_factory=dict)
    warnings: tuple[Text, ...] = ()
    notes: tuple[Text, ...] = ()
    lines: tuple[Text, ...] = ()
    """What the table in the terminal says above its rows, and its rows; an older dtl wrote neither."""
    table: tuple[tuple[Text, ...], ...] = ()


@dataclass
class RunRecord:
    """One run folder."""

    path: Path
    stored: StoredConfig | None = None
    phases: list[PhaseRecord] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    status: Status = field(default_factory=Status)
    transfer: TransferFacts | None = None
    model: ModelFacts | None = None
    """model.json"""
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A fold's one says of which recipe it is: every recipe has a fold-1."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if path.parent.name.endswith((FOLDS_END, SEARCH_END)) else path.name

    @property
    def config(self) -> Config | None:
        """In it nothing runs a command or is fetched, unless the run is this user's own."""
        return self.stored.config if self.stored is not None else None

    @property
    def settings(self) -> dict[str, Any]:
        """All that config.yaml says, for showing, by dotted keys; {} without it."""
        return {} if self.stored is None else {**self.stored.config.flat(), **self.stored.withheld}

    @property
    def is_grouped(self) -> bool:
        """Its images come in groups (`data.group`), so that they are not independent."""
        return any((key == "data.group" or key.startswith("data.group.")) and value is not None for key, value in self.settings.items())

    @property
    def monitor(self) -> str:
        return self.config.checkpoint.monitor if self.config is not None else "top1"

    @property
    def test(self) -> dict[str, Any] | None:
        """The metrics of the run's weights on its test set; None where there is none, or they are not known."""
        found = self.status.test
        return found if found is not None and all(isinstance(found.get(name), int | float) for name in ("top1", "loss", "num_samples")) else None

    @property
    def last_step(self) -> int:
        return self.phases[-1].last_step if self.phases else 0

    @functools.cached_property
    def steps_per_epoch(self) -> int | None:
        """From the events' steps and epochs, helped by the planned durations; None where no epoch was ever finished."""
        return _steps_per_epoch(self)

    def first_epoch(self, phase: PhaseRecord) -> int | None:
        """The epoch of the run that the phase began with."""
        per_epoch = self.steps_per_epoch
        for events in (phase.train, phase.val):
            if per_epoch and len(events["step"]):
                return int(events["epoch"][0]) - (int(events["step"][0]) - 1 - phase.first_step) // per_epoch
        return None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder. UserError where it is none."""
    path = user_path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder{near_run(path)}")
    if never_began(path):
        raise UserError(f"{path} contains no run: {why_none_began(path)}")
    if not any((path / name).exists() for name in ("history.jsonl", "config.yaml", "model")):
        raise UserError(f"{path} is not a run folder: it has no history.jsonl, no config.yaml and no model folder")
    record = RunRecord(path)
    record.model = _read(record, ModelFacts, files.published(path / "model") / "model.json")
    _read_config(record)
    record.status = _read(record, Status, path / "status.json") or Status()
    record.transfer = _read(record, TransferFacts, path / "transfer.json")
    _read_history(record)
    if record.model is None:
        record.missing.append("no model folder: no predictions, confusion matrix and numbers per class")
    return record


def _read_config(record: RunRecord) -> None:
    """config.yaml, or where it is gone the settings that the model folder remembers."""
    try:
        if (record.path / "config.yaml").exists():
            record.stored = stored_config(record.path)
        elif (settings := _settings_of_model(record)) is not None:
            record.stored = settings
        else:
            record.missing.append("no config.yaml: the parts that need the run's data or settings are missing")
    except UserError as error:
        record.missing.append(f"config.yaml cannot be used: {' '.join(str(error).split())}")


def _settings_of_model(record: RunRecord) -> StoredConfig | None:
    settings = None if record.model is None else record.model.made_by.get("settings")
    if record.model is None or not isinstance(settings, dict):
        return None
    text = yaml.safe_dump(settings, sort_keys=False, width=120)
    return parse_stored(text.encode(), f"the settings in {record.path / 'model' / 'model.json'}", own=is_own(record.model.json_sha256))


_R = TypeVar("_R", bound=Record)


def _read(record: RunRecord, form: type[_R], file: Path) -> _R | None:
    """A file of the run; None where it is not there, or cannot be used, which `missing` says."""
    try:
        return form.read(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        record.missing.append(f"{file} cannot be read: {error.strerror or error}")
    except UserError as error:
        record.missing.append(f"a file that cannot be used: {error}")
    return None


# ---- history


def _read_history(record: RunRecord) -> None:
    """Columns are gathered phase by phase: a run of weeks has a million lines, and each is dropped once it is read."""
    file = record.path / "history.jsonl"
    columns: dict[str, dict[str, dict[str, list[float]]]] = {}
    wanted = {**_COLUMNS, "val": tuple(dict.fromkeys((*VAL_COLUMNS, record.monitor)))}
    unread = 0
    try:
        for event in json_lines(file):
            kind, phase = str(event.get("event")), event.get("phase")
            if kind == "note":
                record.notes.append(event)
            elif kind in _COLUMNS and isinstance(phase, str) and all(_is_place(event.get(name)) for name in ("step", "epoch")):
                kinds = columns.setdefault(phase, {name: _empty(names) for name, names in wanted.items()})
                for name, values in kinds[kind].items():
                    values.append(_number(event.get(name)))
            elif not event or kind in _COLUMNS:
                unread += 1
    except FileNotFoundError:
        record.missing.append("no history.jsonl: there are no curves")
        return
    except (OSError, UserError) as error:
        record.missing.append(f"history.jsonl cannot be read: {getattr(error, 'strerror', None) or error}")
        return
    if unread:
        record.missing.append(f"{counted(unread, 'line')} of history.jsonl that cannot be read")
    rows = {row["phase"]: row for row in record.status.phases}
    first_step = 0
    for name, kinds in columns.items():
        settings = record.config.phases.get(name) if record.config is not None else None
        arrays = {kind: {column: np.asarray(values) for column, values in found.items()} for kind, found in kinds.items()}
        task, keep = (settings.task, settings.keep) if settings else ("classify", "best")
        phase = PhaseRecord(name, task, first_step, arrays["train"], arrays["val"], keep, rows.get(name, {}), arrays["epoch"])
        record.phases.append(phase)
        first_step = phase.last_step


def _empty(names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: [] for name in names}


def _is_place(value: Any) -> bool:
    """A step or an epoch."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _number(value: Any) -> float:
    """History writes what JSON has no number for as "nan", "inf", "-inf"."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# ---- epochs


def _steps_per_epoch(record: RunRecord) -> int | None:
    """History has no such number. Event (step s, epoch e) of a phase begun at (f, e0) says (s-1-f) // n == e-e0: that bounds n."""
    low, high = 1, None
    for before, phase in zip([None, *record.phases], record.phases):
        seen = [events for events in (phase.train, phase.val) if len(events["step"])]
        if not seen:
            continue
        steps = np.concatenate([events["step"] for events in seen]).astype(np.int64) - 1 - phase.first_step
        epochs = np.concatenate([events["epoch"] for events in seen]).astype(np.int64)
        # A phase begins in a new epoch; its first event may come after that epoch when an epoch is shorter than the log interval.
        epochs -= _first_epoch_after(before, int(epochs.min()))
        low = max(low, int((steps // (epochs + 1) + 1).max()))
        later = epochs > 0
        if later.any():
            most = int((steps[later] // epochs[later]).min())
            high = most if high is None else min(high, most)
    for planned in _planned_steps_per_epoch(record):
        if low <= planned and (high is None or planned <= high):
            return planned
    return high if high is not None and high >= low else None


def _first_epoch_after(before: PhaseRecord | None, seen: int) -> int:
    """The epoch that a phase began with, whose first event is of epoch `seen`."""
    if before is None:
        return 0
    last = max((int(events["epoch"].max()) for events in (before.train, before.val) if len(events["epoch"])), default=seen - 1)
    return min(seen, last + 1)


def _planned_steps_per_epoch(record: RunRecord) -> Iterator[int]:
    """Likely values: from finished phases with a duration in epochs, from the status, from the first evaluation of a phase."""
    ended_early = {note.get("phase") for note in record.notes if note.get("note") == "early stop" and isinstance(note.get("phase"), str)}
    for place, phase in enumerate(record.phases):
        settings = record.config.phases.get(phase.name) if record.config is not None else None
        finished = place < len(record.phases) - 1 or record.status.state == "done"
        if settings is not None and settings.epochs and not settings.steps and finished and phase.name not in ended_early:
            yield max(1, round(phase.num_steps / settings.epochs))
    for phase in record.phases:
        epochs = phase.row.get("epochs")
        if isinstance(epochs, (int, float)) and epochs > 0:
            yield max(1, round(phase.num_steps / epochs))
    for phase in record.phases:
        settings = record.config.phases.get(phase.name) if record.config is not None else None
        own = phase.val["step"][phase.val["step"] > phase.first_step]  # not the evaluation before its first step
        if settings is not None and len(own):
            yield max(1, round((int(own[0]) - phase.first_step) / settings.eval_every))
