"""What a search has come to: the table of its trials, the winner and whether it can be told from the others, and one look at the test set.

All of it is a function of the trials' files. The winner is chosen among the trials that were trained to their end, by the rule that keeps weights within a
run (`dtl.training.keep`): of those whose metric is within one standard error of the best one's, the one with the lowest validation loss.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtl.credentials import redact
from dtl.data.groups import find_groups
from dtl.errors import UserError
from dtl.files import flock, open_lock, write_json_whole, written
from dtl.inference.evaluate import evaluate
from dtl.inference.model import running_model
from dtl.inference.search import RESULTS_NAME, Score, Search
from dtl.intervals import shown, wilson
from dtl.models.model_json import read_model_json
from dtl.runs.predictions import ImagePredictions, read_predictions, recorded_file
from dtl.text import Column, Log, counted, table
from dtl.training.keep import Evaluated, PairedError, choose_one
from dtl.training.metrics import RANKED
from dtl.untrusted import read_json

_OF_TEST = ("num_samples", "top1", "top1_interval", "loss", "balanced_accuracy", "macro_f1", "look")


def conclude(search: Search, words: Sequence[str], *, log: Log) -> dict[str, Any]:
    """The values of results.json, which is written by the first worker that asks for them. `words`: the recipe's part of the command line."""
    with written(search.folder), closing(open_lock(search.folder / ".results.lock")) as lock:
        flock(lock)
        if (search.folder / RESULTS_NAME).is_file():
            return _stored(search.folder / RESULTS_NAME)
        values: dict[str, Any] = redact(_results(search, words, log))
        write_json_whole(search.folder / RESULTS_NAME, values)
        return values


def _stored(file: Path) -> dict[str, Any]:
    values = read_json(file)
    try:
        lines(values)
        return dict(values)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__} {error}); without it the same command writes it again") from error


def _results(search: Search, words: Sequence[str], log: Log) -> dict[str, Any]:
    left, complete = search.look()
    assert not left, "a search that is not finished has no results"
    trials = list(complete[0])
    finalists = _finalists(search, trials)
    ranking = _ranked(search, trials, complete, finalists)
    if not finalists:
        raise UserError(f"{search.folder}: no trial came to its end: all diverged; give a space of lower learning rates, and another --run.name")
    winner = finalists[ranking[0]]
    rows = [_row(search, number, complete, winner, finalists.get(number)) for number in ranking]
    same = [row["trial"] for row in rows if row["better"] is not None and not row["told_apart"]]
    settings = search.trial(ranking[0]).settings
    return {
        "monitor": search.monitor,
        "rungs": search.rungs,
        "num_samples": search.splits.val.num_samples,
        "winner": ranking[0],
        "runner_up": ranking[1] if len(finalists) > 1 else None,
        "not_told_apart": same,
        "trials": rows,
        "test": _test(search, ranking[0], log) if search.has_test else None,
        "command": _command(words, settings),
    }


# ---- the trials that were trained to their end


@dataclass(frozen=True)
class _Finalist:
    """With what its weights predict for each validation image. In place of the phase's loss, which the settings may change, the plain cross-entropy."""

    trial: int
    value: float
    metrics: Mapping[str, Any]
    predictions: ImagePredictions
    evaluated: Evaluated

    @property
    def loss(self) -> float:
        return self.evaluated.loss


def _finalists(search: Search, trials: Sequence[int]) -> dict[int, _Finalist]:
    found = {}
    for trial in trials:
        if search.is_done(trial):
            found[trial] = _finalist(search, trial)
    return found


def _finalist(search: Search, trial: int) -> _Finalist:
    place, val = search.place(trial), search.splits.val
    model = read_model_json(place / "model")
    facts = recorded_file(model.made_by, str(place / "model" / "model.json"))
    predictions = None if facts is None else read_predictions(place, facts, len(model.classes))
    if facts is None or predictions is None:
        raise UserError(f"{place} has lost its predictions.npy, by which trials are compared; delete the folder, and run the same command again")
    if facts.data != val.dataset_id:
        raise UserError(f"{place} was validated on other images than the recipe; trials of different validation images cannot be compared")
    value = float(model.metrics[search.monitor])
    loss = float(predictions.loss.astype(np.float64).mean()) if len(predictions) else float("nan")
    value = -value if search.monitor == "loss" else value
    columns = _columns(search.monitor, predictions, len(model.classes))
    return _Finalist(trial, value, model.metrics, predictions, Evaluated(value, loss, predictions.samples, predictions.labels, columns))


def _columns(monitor: str, predictions: ImagePredictions, num_classes: int) -> Any:
    """What a standard error is computed from (see `Evaluated`); of what is not kept nothing, so that the metric itself decides."""
    if monitor == "top1":
        return (~predictions.wrong).astype(np.float32)[:, None]
    if monitor == "loss":
        return predictions.loss[:, None]
    if monitor in ("balanced_accuracy", "macro_f1"):
        return predictions.predicted.astype(np.float32)[:, None]
    if monitor in RANKED and num_classes == 2:
        return np.where(predictions.predicted == 1, predictions.probability, 1 - predictions.probability).astype(np.float32)[:, None]
    return np.zeros((len(predictions), 1), np.float32)


def _ranked(search: Search, trials: Sequence[int], complete: Sequence[Mapping[int, Score]], finalists: Mapping[int, _Finalist]) -> list[int]:
    """The winner, the one that would win without it, and so on; then those that were stopped, the furthest first."""
    data = search.config.data
    groups = None
    if data.group is not None and finalists:
        groups = find_groups(search.splits.val, data.group, str(data.val or data.train), columns=data.columns).codes
    error = PairedError(search.monitor, len(search.splits.train.classes), groups)
    left, ranking = [finalists[number] for number in sorted(finalists)], list[int]()
    while left:
        best = choose_one(left, lambda one, other: error(one.evaluated, other.evaluated))
        ranking.append(best.trial)
        left.remove(best)
    others = [number for number in trials if number not in finalists]

    def place(number: int) -> tuple[float, ...]:
        rung, score = _furthest(complete, number)
        return (-rung, *(-part for part in score.order), number)

    return [*ranking, *sorted(others, key=place)]


def _furthest(complete: Sequence[Mapping[int, Score]], trial: int) -> tuple[int, Score]:
    return next((rung, complete[rung][trial]) for rung in reversed(range(len(complete))) if trial in complete[rung])


def _row(search: Search, trial: int, complete: Sequence[Mapping[int, Score]], winner: _Finalist, own: _Finalist | None) -> dict[str, Any]:
    rung, score = _furthest(complete, trial)
    value = score.value if own is None else own.value
    paired = None if own is None or own is winner or search.config.data.group is not None else winner.predictions.against(own.predictions)
    diverged = score.value == float("-inf")
    return {
        "trial": trial,
        "settings": search.trial(trial).settings,
        "state": "done" if own is not None else "diverged" if diverged else "stopped",
        "epochs": None if own is not None or diverged else search.rungs[rung],
        "value": None if diverged else abs(value),
        "loss": None if diverged else score.loss if own is None else own.loss,
        "better": None if paired is None else paired.better,
        "worse": None if paired is None else paired.worse,
        "p": None if paired is None else paired.p,
        "told_apart": None if paired is None else paired.is_different,
    }


# ---- the winner


def _test(search: Search, trial: int, log: Log) -> dict[str, Any]:
    with running_model(search.place(trial), device=search.config.run.device, log=log) as model:
        values = evaluate(model, split="test", log=log)
    return {name: values.get(name) for name in _OF_TEST}


def _command(words: Sequence[str], settings: Mapping[str, Any]) -> str:
    """What trains the winner by itself: the recipe's own options, without those that its settings replace."""
    kept: list[str] = []
    rest, replaced = list(words), {*(key.replace("-", "_") for key in settings), "run.name"}
    name = "best"
    while rest:
        option = rest.pop(0)
        own = [option] if "=" in option or not rest or rest[0].startswith("--") else [option, rest.pop(0)]
        key = option[2:].partition("=")[0].replace("-", "_")
        if key == "run.name":
            name = f"{own[-1].rpartition('=')[2]}-best"
        elif key not in replaced:
            kept += own
    for key, value in settings.items():
        kept += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(["dtl", "train", *kept, "--run.name", name])


def lines(values: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    monitor = values["monitor"]
    keys: list[str] = list(dict.fromkeys(key for row in values["trials"] for key in row["settings"]))
    columns = [Column("trial"), *(Column(key) for key in keys), Column("epochs"), Column(f"val {monitor}", right=True), Column("loss", right=True), Column("")]
    rows = []
    for row in values["trials"]:
        if row["trial"] == values["winner"]:
            note = "winner"
        elif row["told_apart"] is not None:
            note = "told apart" if row["told_apart"] else "not told apart from the winner"
        else:
            note = "" if row["state"] == "done" else row["state"]
        cells = [_cell(row["settings"][key]) if key in row["settings"] else "as in the recipe" for key in keys]
        rows.append(
            [
                str(row["trial"]),
                *cells,
                str(row["epochs"] or {"done": "all"}.get(row["state"], "-")),
                _number(row["value"], monitor),
                _number(row["loss"], "loss"),
                note,
            ]
        )
    return [*table(columns, rows).split("\n"), "", *_ending(values)]


def _ending(values: Mapping[str, Any]) -> list[str]:
    winner, second = values["trials"][0], next((row for row in values["trials"] if row["trial"] == values["runner_up"]), None)
    found = [f"winner: trial {winner['trial']}, val {values['monitor']} {_number(winner['value'], values['monitor'])}"]
    if second is None:
        found.append("no other trial was trained to its end, so there is nothing to compare it with")
    elif second["p"] is None:
        found.append("images come in groups, which McNemar's test takes for independent: trials are not compared image by image")
    else:
        verdict = "told apart" if second["told_apart"] else "not told apart"
        found.append(
            f"against the runner-up, trial {second['trial']}, on the same {counted(values['num_samples'], 'validation image')}: better on "
            f"{second['better']:,}, worse on {second['worse']:,}, p = {second['p']:.2g}: {verdict} (McNemar's exact test)"
        )
    if values["not_told_apart"]:
        found.append(f"cannot be told from the winner: trial {', '.join(map(str, values['not_told_apart']))}")
    test = values["test"]
    if test is None:
        found.append(
            f"there is no test set: the winner's accuracy is the best of {counted(len(values['trials']), 'trial')} on the images that chose it, and too good; "
            "--data.test SRC or --data.test-fraction 0.1 with another --run.name measures it"
        )
    else:
        interval = wilson(test["top1"], test["num_samples"]) if test["top1_interval"] is None else test["top1_interval"]
        found.append(
            f"test: top1 {100 * test['top1']:.2f} % (95 % interval {shown(interval)} %) of {counted(test['num_samples'], 'image')}, look {test['look']}"
        )
    return [*found, f"to train the winner by itself: {values['command']}"]


def _number(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
