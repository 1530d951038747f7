"""Synchronous successive halving (Jamieson and Talwalkar 2016) over run folders: which trials there are, and what is to be trained next.

    RUNS/NAME-search/search.json       which search this is: the space, the seed, the images, the budget
    RUNS/NAME-search/budget.json       how many trials a budget in minutes has come to: written once
    RUNS/NAME-search/trial-1/ ...      an ordinary run each, which stops at the epochs of its rungs and goes on if it is promoted
    RUNS/NAME-search/results.json      the table, the winner, its test

All trials are trained to the first rung; a third of them, the best, to the next one; and so on, at least two to their end. A trial's schedule is that of
its full length from the first step on, so one that was promoted is bit-identical to one that never paused. What comes next is a function of the files of
the trials (`history.jsonl`, status.json). So there is no server, workers only lock the trial that they train, and any of them may die at any moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch

from dtl.checkpoint.resume.resume import FREE_SETTINGS
from dtl.checkpoint.resume.state import config_conflicts
from dtl.checkpoint.transfer.source.read import check_is_there
from dtl.config import Config
from dtl.config.auto import epoch_steps, with_batch_size
from dtl.config.models import flat
from dtl.config.own import stored_config
from dtl.config.space import Resolve, Settings, Space, candidates, described
from dtl.credentials import redact
from dtl.data.splits_of_run import Splits, open_splits
from dtl.errors import EXIT_STOPPED, Diverged, Occupied, UserError
from dtl.files import flock, open_lock, write_json_whole, written
from dtl.models.network import Network
from dtl.runs.folder import heartbeat, read_status
from dtl.runs.looks import SEARCH_END
from dtl.text import Log, counted, to_nobody
from dtl.training.build import check_phase, network_to_check
from dtl.training.loop import PAUSED
from dtl.training.run import run as run_training
from dtl.untrusted import Count, NumbersObject, Record, Text, json_lines, only_version

SEARCH_NAME, BUDGET_NAME, RESULTS_NAME = "search.json", "budget.json", "results.json"
ETA = 3  # of the trials of a rung one in so many is promoted
_RUNGS = 3
_MOST_MEASURED = 243  # trials of a budget in minutes
_MOST_NETWORKS = 100  # that are looked at before anything is trained: a range of numbers below `model` makes one for each trial
_LEAST_FINALISTS = 2  # so that there is a runner-up
_VERSION = 1  # of search.json, of how settings are drawn and how trials are promoted
_LOOK_SECONDS, _SILENT_SECONDS = 0.5, 30.0
_OTHERWISE = "give the same again, or begin another search with --run.name NEW"

# ---- the rules, of numbers alone


@dataclass(frozen=True)
class Score:
    """What a trial has come to at a rung: `value` is greater for the better, and -inf for one that diverged."""

    value: float
    loss: float

    @property
    def order(self) -> tuple[float, float]:
        return (-math.inf if math.isnan(self.value) else self.value), (-math.inf if math.isnan(self.loss) else -self.loss)


def rungs_of(epochs: int, *, first: int = 0) -> list[int]:
    """The epochs after which trials are compared, the last being the end. `first`: so many of them come before anything can differ."""
    rest = epochs - first
    return sorted({first + max(1, round(rest / ETA**power)) for power in range(_RUNGS)})


def num_promoted(number: int) -> int:
    return min(number, max(_LEAST_FINALISTS, -(-number // ETA)))


def promoted(scores: Mapping[int, Score]) -> list[int]:
    """The trials that go on, in the order of their numbers. Of equal ones those of the lower number."""
    best = sorted(scores, key=lambda number: (*(-part for part in scores[number].order), number))
    return sorted(best[: num_promoted(len(scores))])


def seconds_of(lengths: Sequence[int], *, fixed: float, per_epoch: float, rungs: Sequence[int]) -> float:
    """What a search of trials of so many epochs takes, of all workers together, if each start costs `fixed` seconds and each epoch `per_epoch`. Which trials
    are promoted nobody knows: the longest."""
    total, before, left = 0.0, 0, sorted(lengths, reverse=True)
    for rung in rungs:
        parts = [min(length, rung) - before for length in left if length > before]
        total += len(parts) * fixed + sum(parts) * per_epoch
        left, before = left[: num_promoted(len(left))], rung
    return total


def trials_within(seconds: float, lengths: Sequence[int], *, fixed: float, per_epoch: float, rungs: Sequence[int]) -> int:
    """How many of the trials of these `lengths`, in their order, a search has that takes at most so many seconds (`seconds_of`)."""
    fit = (number for number in range(1, len(lengths) + 1) if seconds_of(lengths[:number], fixed=fixed, per_epoch=per_epoch, rungs=rungs) <= seconds)
    return max(fit, default=0)


@dataclass(frozen=True)
class Task:
    """Train a trial up to a rung."""

    trial: int
    rung: int


def next_tasks(trials: Sequence[int], rungs: Sequence[int], score: Callable[[int, int], Score | None]) -> tuple[list[Task], list[dict[int, Score]]]:
    """(what is left of the lowest rung that is not complete, the scores of each complete rung). `score(trial, number of the rung)`: None: not yet."""
    complete: list[dict[int, Score]] = []
    left = list(trials)
    for number in range(len(rungs)):
        scores = {trial: score(trial, number) for trial in left}
        known = {trial: found for trial, found in scores.items() if found is not None}
        if len(known) < len(left):
            return [Task(trial, number) for trial in left if trial not in known], complete
        complete.append(known)
        left = promoted(known)
    return [], complete


# ---- the files


class SearchFile(Record):
    """search.json."""

    version: Annotated[int, only_version(_VERSION)] = _VERSION
    space: NumbersObject
    seed: int
    train: Text
    """Dataset ids."""
    val: Text
    trials: Count | None
    """The budget, or"""
    minutes: float | None
    threads: Count
    """Of each trial: sums depend on it."""
    test: Text | None = None
    """Dataset id; empty: there is no test set. None: an older dtl began the search."""


class BudgetFile(Record):
    """budget.json."""

    trials: Count


def _shown_seconds(seconds: float) -> str:
    return f"{seconds:.3g} seconds" if seconds < 60 else "1 minute" if seconds == 60 else f"{seconds / 60:.4g} minutes"


@dataclass(frozen=True)
class Budget:
    trials: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        if self.minutes is None:
            return counted(self.trials or 0, "trial")
        return _shown_seconds(60 * self.minutes)


@dataclass(frozen=True)
class Trial:
    number: int
    settings: Settings
    config: Config

    @property
    def name(self) -> str:
        return f"trial-{self.number}"


@dataclass
class Search:
    """A search, by its folder. `config` is the recipe, which is trial 1."""

    folder: Path
    config: Config
    space: Space
    resolve: Resolve
    splits: Splits
    budget: Budget
    threads: int = 0

    @cached_property
    def _drawn(self) -> list[tuple[Settings, Config]]:
        drawn = self.space.first(self.budget.trials or _MOST_MEASURED, self.config.run.seed, self.resolve)
        return [(settings, with_batch_size(config, self.splits.train.num_samples)) for settings, config in drawn]

    @property
    def num_trials(self) -> int | None:
        """None while a budget in minutes is not yet measured."""
        if self.budget.trials is not None:
            return len(self._drawn)
        try:
            return min(BudgetFile.read(self.folder / BUDGET_NAME).trials, len(self._drawn))
        except FileNotFoundError:
            return None

    @property
    def has_test(self) -> bool:
        return self.splits.test is not None

    @property
    def monitor(self) -> str:
        return self.config.checkpoint.monitor

    @cached_property
    def rungs(self) -> list[int]:
        """In epochs."""
        configs = [config for _, config in self._drawn]
        before = list(self.config.phases)[: self._last_changed]
        return rungs_of(max(self.lengths), first=max(self._epochs(config, before) for config in configs))

    @property
    def lengths(self) -> list[int]:
        """Of the trials, in epochs."""
        return [self._epochs(config) for _, config in self._drawn]

    @property
    def _last_changed(self) -> int:
        """The number of the last phase that the space changes: rungs begin in it. 0 where it changes none, and so all of them."""
        changed = {key.split(".")[1] for key in self.space.keys if key.startswith("phases.")}
        return max((number for number, name in enumerate(self.config.phases) if name in changed), default=0)

    def check_trials(self) -> None:
        """UserError for trials that cannot be compared, and for a network or a phase that cannot be, of the last trial too, before anything is trained."""
        train, sources, networks, phases_seen = self.splits.train, set[str](), dict[str, Network](), set[tuple[str, str]]()
        for settings, config in self._drawn:
            where = f"{self.space.origin}: {described(settings)}: " if settings else ""
            phases = list(config.phases.items())[self._last_changed :]
            if pretext := next((name for name, phase in phases if phase.task != "classify"), None):
                raise UserError(
                    f"{where}phase {pretext} does not classify, so trials cannot be compared in it: train it first, and search without it from its weights "
                    f"(--phases.{pretext} null --transfer.source runs/NAME)"
                )
            source, identity = "pretrained" if config.transfer is None else config.transfer.source, repr(config.model)
            try:
                if source not in {"pretrained", *sources}:
                    check_is_there(source)
                    sources.add(source)
                if identity not in networks and len(networks) < _MOST_NETWORKS:
                    networks[identity] = network_to_check(config, train.num_classes)
                for name, phase in config.phases.items() if identity in networks and config.data == self.config.data else ():
                    if (identity, repr((name, phase))) not in phases_seen:
                        check_phase(name, phase, networks[identity], train)
                        phases_seen.add((identity, repr((name, phase))))
            except UserError as error:
                raise UserError(f"{where}{error}") from error

    def _epochs(self, config: Config, names: Sequence[str] | None = None) -> int:
        """Of these phases together, as history.jsonl counts them."""
        steps = epoch_steps(config.data, self.splits.train.num_samples)
        return sum(-(-phase.num_steps(steps) // steps) for name, phase in config.phases.items() if names is None or name in names)

    def trial(self, number: int) -> Trial:
        """An ordinary run, of few checkpoints and without pages."""
        settings, config = self._drawn[number - 1]
        name = f"trial-{number}"
        run = config.run.model_copy(update={"dir": str(self.folder), "name": name})
        tracking = config.tracking.model_copy(update={"report": False})
        checkpoint = config.checkpoint
        if "keep" not in checkpoint.model_fields_set:
            checkpoint = checkpoint.model_copy(update={"keep": 1})
        return Trial(number, settings, config.model_copy(update={"run": run, "tracking": tracking, "checkpoint": checkpoint}))

    def place(self, number: int) -> Path:
        return self.folder / f"trial-{number}"

    def look(self) -> tuple[list[Task], list[dict[int, Score]]]:
        """What is left to do, and the complete rungs."""
        number = self.num_trials
        if number is None:
            return [Task(1, 0)], []
        return next_tasks(range(1, number + 1), self.rungs, self.score)

    def score(self, trial: int, rung: int) -> Score | None:
        return score_of(self.place(trial), None if rung == len(self.rungs) - 1 else self.rungs[rung], self.monitor)

    def is_done(self, trial: int) -> bool:
        return _is_done(self.place(trial))


def _is_done(run: Path) -> bool:
    status = read_status(run)
    return status.state == "done" and status.model is not None


def score_of(run: Path, epochs: int | None, monitor: str) -> Score | None:
    """Of the weights that a run keeps at its first evaluation after so many epochs, or at its end (None); None where it has not come so far."""
    kept: Score | None = None
    for row in json_lines(run / "history.jsonl") if (run / "history.jsonl").is_file() else ():
        if row.get("event") == "note" and row.get("note") == "diverged":
            return Score(-math.inf, math.inf)
        if row.get("event") != "val":
            continue
        if row.get("kept"):
            value = float(row.get(monitor, "nan"))
            kept = Score(-value if monitor == "loss" else value, float(row["loss"]))
        if epochs is not None and not row.get("entering") and row["epoch"] + 1 >= epochs:
            return kept
    return kept if _is_done(run) else None


def open_search(config: Config, name: str, space: Space | None, resolve: Resolve, budget: Budget | None, *, log: Log) -> Search:
    """The search of a recipe and a space (None: the built-in candidates); its images are packed if they are not yet. Writes nothing into the run folder.
    UserError where it cannot be carried out, or is another one than the folder's."""
    if config.run.debug:
        raise UserError("run.debug is for one run: dtl train --run.debug true")
    if config.run.resume != "auto":
        raise UserError(f"run.resume {config.run.resume} is for one run; a search goes on where it was, and another gets another name (--run.name NEW)")
    if space is not None and config.data.val is None and {"data.train", "data.names"} & set(space.keys):
        raise UserError(f"{space.origin}: with another data.train other images validate, and trials could not be compared; give --data.val")
    folder = Path(config.run.dir) / f"{name}{SEARCH_END}"
    before = SearchFile.read(folder / SEARCH_NAME) if (folder / SEARCH_NAME).exists() else None
    budget = budget or (Budget(27) if before is None else Budget(before.trials, before.minutes))
    splits = open_splits(config.data, log=log, progress=log is not to_nobody)
    if space is None:
        space = candidates(with_batch_size(config, splits.train.num_samples))  # around the learning rates of that size
    search = Search(folder, config, space, resolve, splits, budget)
    search.check_trials()
    if before is not None:
        _compare(search, before)
        search.threads = before.threads
    return search


def begin(search: Search) -> None:
    """Write search.json, or compare it. Several processes may do so at once."""
    folder, config = search.folder, search.config
    with written(folder):
        if folder.is_dir():
            others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name != "slurm")
            if others and not (folder / SEARCH_NAME).exists():  # asked last: another process may begin the search meanwhile
                raise UserError(f"{folder} is not empty (it holds '{others[0]}'), and no search is in it; choose another name with --run.name NEW")
        folder.mkdir(parents=True, exist_ok=True)
        with closing(open_lock(folder / ".search.lock")) as lock:
            flock(lock)
            before = SearchFile.read(folder / SEARCH_NAME) if (folder / SEARCH_NAME).exists() else None
            if before is not None:
                _compare(search, before)
            search.threads = torch.get_num_threads() if before is None else before.threads
            ids = search.splits.ids()
            now = SearchFile(
                space=redact(search.space.describe()),
                seed=config.run.seed,
                train=ids["train"],
                val=ids["val"],
                test=ids.get("test", ""),
                threads=search.threads,
                **vars(search.budget),
            )
            if now != before:
                write_json_whole(folder / SEARCH_NAME, asdict(now))


def _compare(search: Search, before: SearchFile) -> None:
    folder, space, ids = search.folder, redact(search.space.describe()), search.splits.ids()
    if before.space != space:
        key = next(key for key in [*space, *before.space] if before.space.get(key) != space.get(key))
        raise UserError(f"{folder} is another search: its range of {key} is {before.space.get(key, 'none')}, now it is {space.get(key, 'none')}; {_OTHERWISE}")
    if before.seed != search.config.run.seed:
        raise UserError(f"{folder} was begun with run.seed {before.seed}, now it is {search.config.run.seed}; {_OTHERWISE}")
    if (before.train, before.val) != (ids["train"], ids["val"]):
        raise UserError(f"{folder} was begun with other images: data.train or data.val has changed; {_OTHERWISE}")
    if before.test is not None and before.test != (test := ids.get("test", "")):
        begun = "without a test set" if not before.test else "with another test set" if test else "with a test set, now there is none"
        raise UserError(f"{folder} was begun {begun}; {_OTHERWISE} (dtl evaluate {folder}/trial-N --data.val SRC measures a trial on any images)")
    then, counted_out = Budget(before.trials, before.minutes), before.trials is not None or (folder / BUDGET_NAME).exists()
    if then != search.budget and (counted_out or search.budget.minutes is None):
        raise UserError(f"{folder} was begun with a budget of {then}, now it is {search.budget}; {_OTHERWISE}")
    known = [number for number in range(1, len(search._drawn) + 1) if (search.place(number) / "config.yaml").is_file()]
    for number in known[:1]:
        old, new = stored_config(search.place(number)).config.to_dict(), search.trial(number).config.to_dict()
        for name, was, value in config_conflicts(old, new, ignored=FREE_SETTINGS)[:1]:
            raise UserError(f"{search.place(number)} was trained with {name} {was!r}, now it is {value!r}: all trials need the same recipe; {_OTHERWISE}")


# ---- a worker


@dataclass
class _Watch:
    """What others are at work on."""

    search: Search
    _seen: dict[int, tuple[str, float]]

    def choose(self, tasks: Sequence[Task]) -> Task | None:
        """The first that nobody works on; None: all are taken, or wait for the features that another computes on this machine for a trial of theirs."""
        beats = {task.trial: heartbeat(self.search.place(task.trial)) for task in tasks}
        begun = [trial for trial, beat in beats.items() if beat is not None and beat.endswith("alive") and not self._has_features(trial)]
        computed = {features_of(self.search.trial(trial).config) for trial in begun} - {None}
        free = (task for task in tasks if self._is_free(task.trial, beats[task.trial]))
        return next((task for task in free if not computed or features_of(self.search.trial(task.trial).config) not in computed), None)

    def _is_free(self, trial: int, beat: str | None) -> bool:
        """On this machine at once; elsewhere once its heartbeat has not moved for a while."""
        if beat is None or beat.endswith("alive"):
            return beat is None
        if self._seen.get(trial, ("", 0.0))[0] != beat:
            self._seen[trial] = beat, time.monotonic()
        return time.monotonic() - self._seen[trial][1] > _SILENT_SECONDS

    def _has_features(self, trial: int) -> bool:
        history = self.search.place(trial) / "history.jsonl"
        return history.is_file() and any(row.get("event") in ("train", "val") for row in json_lines(history))


def features_of(config: Config) -> str | None:
    """Trials with the same text share the cached features of their first phase; None where it has none."""
    first = next(iter(config.phases.values()))
    if first.train != "head" or first.cache_features is False:
        return None
    values = {key: value for key, value in flat(config.to_dict()).items() if key.startswith(("data.", "model.", "transfer.", "precision"))}
    return repr((sorted(values.items()), config.run.seed, first.views, first.image_size, first.cache_features))


def work(search: Search, *, workers: int, stopped: Callable[[], bool], log: Log) -> int:
    """Train what is left, until nothing is; several processes may do so at once. Returns 0, or 75 after a signal or the deadline."""
    started = time.monotonic()
    watch = _Watch(search, {})
    with _threads(search.threads):
        while tasks := search.look()[0]:
            task = watch.choose(tasks)
            if stopped():
                return EXIT_STOPPED
            if task is None:
                time.sleep(_LOOK_SECONDS)
            elif not _train(search, task, workers=workers, started=started, log=log):
                return EXIT_STOPPED
    return 0


def _train(search: Search, task: Task, *, workers: int, started: float, log: Log) -> bool:
    """False: a signal or a deadline has stopped it."""
    trial, measures = search.trial(task.trial), search.num_trials is None
    config = trial.config
    if measures:
        # From its beginning: an earlier start, which was killed, cannot be measured any more.
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "never"})})
    last = task.rung == len(search.rungs) - 1
    end = "its end" if last else f"epoch {search.rungs[task.rung]} of {search.rungs[-1]}"
    log(f"{trial.name} of {search.num_trials or 'a number to be measured'}, to {end}: {described(trial.settings)}")
    begun = time.monotonic()
    try:
        result = run_training(config, trial.name, started=started, pause=None if last else search.rungs[task.rung], measure_test=False)
    except Diverged as error:
        if measures and not error.stop_requested:
            raise UserError(
                f"{trial.name} ({described(trial.settings)}): {error}; a budget in minutes is measured on this trial: "
                "give a number of trials, or change the recipe, both with another --run.name"
            ) from error
        log(f"{trial.name}: {error}")
        return not error.stop_requested
    except UserError as error:
        if isinstance(error.__cause__, Occupied):  # another worker was faster
            return True
        raise UserError(f"{trial.name} ({described(trial.settings)}): {error}") from error
    except Exception:  # what follows, a line or a traceback, does not name the trial
        log(f"{trial.name} ({described(trial.settings)}) ended with an error, and this worker with it:")
        raise
    if result.state == "stopped" and read_status(result.folder).why != PAUSED:
        return False
    if measures:
        _write_budget(search, time.monotonic() - begun, workers, log)
    return not result.stop_requested


def _write_budget(search: Search, seconds: float, workers: int, log: Log) -> None:
    """Once: a budget in minutes becomes a number of trials. The first to write it decides."""
    assert search.budget.minutes is not None
    training = sum(row["seen"] / max(row["images_per_second"], 1e-9) for row in json_lines(search.place(1) / "history.jsonl") if row.get("event") == "epoch")
    rungs = search.rungs
    per_epoch = min(training, seconds) / min(rungs[0], search.lengths[0])
    fixed = max(0.0, seconds - training)
    number = trials_within(60 * search.budget.minutes * workers, search.lengths, fixed=fixed, per_epoch=per_epoch, rungs=rungs)
    if number < 1:
        one = seconds_of(search.lengths[:1], fixed=fixed, per_epoch=per_epoch, rungs=rungs)
        raise UserError(f"--budget: {search.budget} are too few for one trial, which takes about {_shown_seconds(one)}; the same command with more goes on")
    facts = {"trials": number, "workers": workers, "seconds_per_start": round(fixed, 3), "seconds_per_epoch": round(per_epoch, 5)}
    with closing(open_lock(search.folder / ".search.lock")) as lock:
        flock(lock)
        if not (search.folder / BUDGET_NAME).exists():
            write_json_whole(search.folder / BUDGET_NAME, facts)
            log(
                f"{search.budget} with {counted(workers, 'worker')} come to {counted(search.num_trials or 0, 'trial')}, as measured on trial 1 and written down"
            )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Every trial of a search computes with as many threads as the first: the rounding of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
