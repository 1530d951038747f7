"""Cross-validation: K runs of one recipe, each without one fold of the training images, and what they come to together.

    RUNS/NAME-folds/folds.json         which folds these are: of which images, how many, by which seed
    RUNS/NAME-folds/fold-1/ ...        an ordinary run each, whose test set is its fold (`data.fold`)
    RUNS/NAME-folds/predictions.csv    one line per image, by the run that was trained without it
    RUNS/NAME-folds/results.json       all numbers
    RUNS/NAME-folds/refit/             a run on all images

The results are a function of the K finished runs. So they do not depend on the order in which these were trained, on which machine, and after how
many kills. Counts are integers, and losses are added with `math.fsum`, which is exact before its one rounding: folds add up to one pass over all images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from dtl.checkpoint.resume.resume import FREE_SETTINGS
from dtl.checkpoint.resume.state import config_conflicts
from dtl.config import Config
from dtl.config.auto import with_batch_size
from dtl.config.models import DataConfig, FoldConfig, num_pixels
from dtl.config.own import stored_config
from dtl.data.groups import Groups
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import folds_of, open_splits, open_training
from dtl.errors import UserError
from dtl.files import flock, open_lock, write_json_whole, written
from dtl.inference.assess import Assessment, RankBatches, assess, pooled
from dtl.inference.model import RunningModel, running_model
from dtl.inference.tables import report
from dtl.intervals import shown
from dtl.models.model_json import read_model_json
from dtl.runs.folder import read_status
from dtl.runs.looks import FOLDS_END
from dtl.text import Column, Log, counted, table, to_nobody
from dtl.training.dataloaders import choose_workers, rank_cores
from dtl.untrusted import Count, Record, Text, only_version

FOLDS_NAME, RESULTS_NAME, CSV_NAME, REFIT = "folds.json", "results.json", "predictions.csv", "refit"
OF_A_FOLD = ("top1", "loss", "balanced_accuracy", "macro_f1", "auroc", "average_precision")
"""What is given of each fold, with mean and range over the folds."""
_BATCH_SIZE = 64
_VERSION = 1  # of folds.json, and of how images are dealt to folds


class FoldsFile(Record):
    """folds.json."""

    version: Annotated[int, only_version(_VERSION)] = _VERSION
    folds: Count
    seed: Count
    data: Text
    """The dataset id of the training images."""
    groups: Text | None
    """Changes with the groups of the images; None without groups."""
    images: tuple[Count, ...]
    """Of each fold."""


@dataclass(frozen=True)
class Folds:
    """The folds of a recipe's training images. `config` is that of the run on all of them."""

    folder: Path
    config: Config
    shards: Shards
    groups: Groups | None
    numbers: npt.NDArray[np.int64]
    """The fold of each sample [N], from 1."""

    @property
    def fold(self) -> FoldConfig:
        assert self.config.data.fold is not None
        return self.config.data.fold

    def name(self, number: int) -> str:
        return f"fold-{number}" if number else REFIT

    def config_of(self, number: int) -> Config:
        """Of the run without fold `number`; 0: of that on all images, which alone may have another test set."""
        data = self.config.data.model_copy(update={"fold": self.fold.model_copy(update={"number": number})})
        if number:
            data = data.model_copy(update={"test": None, "test_fraction": 0.0})
        run = self.config.run.model_copy(update={"dir": str(self.folder), "name": self.name(number)})
        return self.config.model_copy(update={"data": data, "run": run})

    def is_done(self, number: int) -> bool:
        status = read_status(self.folder / self.name(number))
        return status.state == "done" and status.model is not None

    @property
    def refit(self) -> str | None:
        """The run on all images, if it is done."""
        return str(self.folder / self.name(0)) if self.is_done(0) else None

    def missing(self) -> list[int]:
        return [number for number in range(1, self.fold.of + 1) if not self.is_done(number)]


def open_folds(config: Config, name: str, *, log: Log) -> Folds:
    """The folds of a config's training images, which are packed if they are not yet. `config` has `data.fold`. Writes nothing into the run folder. UserError
    where there are too few images or groups for so many folds."""
    assert config.data.fold is not None
    if config.run.debug:
        raise UserError("run.debug is for one run: dtl train --run.debug true")
    if config.run.resume != "auto":
        raise UserError(f"run.resume {config.run.resume} is for one run; folds go on where they were, and others get another name (--run.name NEW)")
    if list(config.phases.values())[-1].task != "classify":
        raise UserError("the last phase does not classify, so there is nothing to measure on the folds")
    shards, groups = open_training(config.data, progress=log is not to_nobody, log=log)
    numbers = folds_of(shards, config.data.fold, groups)
    return Folds(Path(config.run.dir) / f"{name}{FOLDS_END}", config, shards, groups, numbers)


def check_splits(folds: Folds, numbers: Sequence[int]) -> None:
    """UserError where one of these folds leaves no images to validate on: now, not after the hours of the folds before it."""
    for number in numbers:
        try:
            open_splits(folds.config_of(number).data, progress=False, log=to_nobody)
        except UserError as error:
            raise UserError(f"without fold {number} of {folds.fold.of}: {error}") from error


def begin(folds: Folds) -> None:
    """Write folds.json, or compare it: what was begun with other images, another seed, another number of folds or other settings is refused by name.
    Several processes may do so at once."""
    folder, fold = folds.folder, folds.fold
    sizes = np.bincount(folds.numbers, minlength=fold.of + 1)[1:].tolist()
    digest = None if folds.groups is None else folds.groups.digest
    now = FoldsFile(folds=fold.of, seed=fold.seed, data=folds.shards.dataset_id, groups=digest, images=tuple(sizes))
    with written(folder):
        if folder.is_dir():
            _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with closing(open_lock(folder / ".folds.lock")) as lock:
            flock(lock)
            if (folder / FOLDS_NAME).exists():
                _compare(folder, FoldsFile.read(folder / FOLDS_NAME), now)
            else:
                write_json_whole(folder / FOLDS_NAME, asdict(now))
    for number in (*range(1, fold.of + 1), 0):
        place = folder / folds.name(number)
        if (place / "config.yaml").is_file():
            _compare_settings(place, stored_config(place).config, _as_trained(folds.config_of(number)))


def _check_folder(folder: Path) -> None:
    """UserError where other files lie there than runs of folds, which an array of jobs may have trained, and no folds.json with them."""
    others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((".", "fold-")) and entry.name not in (REFIT, "slurm"))
    if others and not (folder / FOLDS_NAME).exists():  # asked last: another process may begin the folds meanwhile
        raise UserError(f"{folder} is not empty (it holds '{others[0]}'), and no folds are in it; choose another name with --run.name NEW")


def _compare(folder: Path, before: FoldsFile, now: FoldsFile) -> None:
    facts = {"folds": ("--folds", before.folds, now.folds), "seed": ("data.fold.seed", before.seed, now.seed)}
    for what, old, new in facts.values():
        if old != new:
            raise UserError(f"{folder} was begun with {what} {old}, now it is {new}; {_OTHERWISE}")
    if before.data != now.data:
        raise UserError(f"{folder} was begun with other images ({sum(before.images):,}, now {sum(now.images):,}): data.train has changed; {_OTHERWISE}")
    if before.groups != now.groups or before.images != now.images:
        raise UserError(f"{folder} was begun with other groups: data.group has changed; {_OTHERWISE}")


_OTHERWISE = "give the same again, or begin other folds with --run.name NEW"


def _as_trained(config: Config) -> Config:
    """With the batch size that its images give it."""
    if config.data.global_batch_size != "auto":
        return config
    return with_batch_size(config, open_splits(config.data, progress=False, log=to_nobody).train.num_samples)


def _compare_settings(place: Path, before: Config, now: Config) -> None:
    conflicts = config_conflicts(before.to_dict(), now.to_dict(), ignored=FREE_SETTINGS)
    if conflicts:
        name, old, new = conflicts[0]
        raise UserError(f"{place} was trained with {name} {old!r}, now it is {new!r}: all folds need the same settings; {_OTHERWISE}")


# ---- what the folds come to


@dataclass(frozen=True)
class Together:
    """The out-of-fold predictions of all images."""

    values: dict[str, Any]
    """results.json"""
    seen: Assessment
    """Of all images, by their numbers in the training split."""


def collect(folds: Folds, *, log: Log = to_nobody) -> Together:
    """Measure each fold with the run that was trained without it, and add up. All runs must be done."""
    parts: list[tuple[Assessment, npt.NDArray[np.int64]]] = []
    rows: list[dict[str, Any]] = []
    for number in range(1, folds.fold.of + 1):
        with running_model(folds.folder / folds.name(number), device=folds.config.run.device, log=log) as model:
            test, where = _test_of(folds, number)
            seen = _measured(model, test, folds.config.data)
            facts = model.stored
            precision = model.runtime.precision
            own = None if folds.groups is None else folds.groups.codes[where]
            rows.append(_row(number, report(pooled([(seen, np.arange(test.num_samples))]), test, classes=facts.classes, names=facts.shown_names, groups=own)))
            parts.append((seen, where))
    whole = pooled(parts)
    codes = None if folds.groups is None else folds.groups.codes
    found = report(whole, folds.shards, classes=facts.classes, names=facts.shown_names, groups=codes)
    known = {key: [row[key] for row in rows if row[key] is not None] for key in OF_A_FOLD}
    values = {
        "folds": folds.fold.of,
        "seed": folds.fold.seed,
        **found,
        "correct": _correct(found),
        "per_fold": rows,
        "mean": {key: math.fsum(ones) / len(ones) if ones else None for key, ones in known.items()},
        "range": {key: [min(ones), max(ones)] if ones else None for key, ones in known.items()},
        "num_groups": None if folds.groups is None else len(folds.groups.names),
        "dataset_id": folds.shards.dataset_id,
        "precision": precision,
        "refit": folds.refit,
    }
    return Together(values, whole)


def _test_of(folds: Folds, number: int) -> tuple[Shards, npt.NDArray[np.int64]]:
    """A fold's images, and their numbers in the training split [n]."""
    splits = open_splits(folds.config_of(number).data, progress=False, log=to_nobody)
    assert splits.test is not None
    where = np.searchsorted(folds.shards.numbers, splits.test.numbers)
    place = folds.folder / folds.name(number)
    if not np.array_equal(where, np.flatnonzero(folds.numbers == number)) or read_model_json(place / "model").made_by.get("data") != splits.train.dataset_id:
        raise UserError(f"{place} was not trained on the images outside of its fold; {_OTHERWISE}")
    return splits.test, where


def _measured(model: RunningModel, test: Shards, data: DataConfig) -> Assessment:
    runtime, transform = model.runtime, model.stored.transform
    workers = choose_workers(
        data.workers, runtime, rank_cores(runtime), batch_bytes=transform.reading.channels * num_pixels(transform.image_size) * _BATCH_SIZE
    )
    batches = RankBatches(test, transform, batch_size=_BATCH_SIZE, workers=workers, runtime=runtime)
    return assess(model.forward, batches, task=model.stored.task, num_outputs=len(model.stored.classes), skip_damaged=data.on_error == "skip")


def _correct(values: dict[str, Any]) -> int:
    return round(values["top1"] * values["num_samples"]) if values["num_samples"] else 0


def _row(number: int, values: dict[str, Any]) -> dict[str, Any]:
    images = values["num_samples"]
    return {
        "fold": number,
        "num_samples": images,
        "correct": _correct(values),
        "top1_interval": values["top1_interval"],
        **{key: values[key] for key in OF_A_FOLD},
    }


def lines(values: dict[str, Any]) -> list[str]:
    """The folds for a terminal: one line each, mean and range, and the sum."""
    columns = [Column("fold"), *(Column(name, right=True) for name in ("images", "right", "top1", "95 % interval", "loss", "balanced accuracy"))]
    rows = [
        [
            str(row["fold"]),
            f"{row['num_samples']:,}",
            f"{row['correct']:,}",
            percent(row["top1"]),
            shown(row["top1_interval"]),
            _plain(row["loss"]),
            percent(row["balanced_accuracy"]),
        ]
        for row in [*values["per_fold"], {**values, "fold": "all"}]
    ]
    return [*table(columns, rows).split("\n"), "", over_folds(values)]


def over_folds(values: dict[str, Any]) -> str:
    """Mean and range of top1 over the folds."""
    low, high = values["range"]["top1"] or (None, None)
    return f"over {counted(values['folds'], 'fold')}: top1 {percent(values['mean']['top1'])} on average, {percent(low)} to {percent(high)}"


def expected(values: dict[str, Any]) -> str:
    """What the folds say about a run on all images."""
    within = shown(values["top1_interval"])
    known = f"{percent(values['top1'])}{f' (95 % interval {within} %)' if within else ''}"
    return f"its expected top1 is that of the folds, {known}: no image is left to measure it on"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
