"""The end of a run: the model folder, the closing table, the report, and what to do next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from dtl.checkpoint.resume.model_folder import check_model_folder, save_model_folder
from dtl.checkpoint.resume.state import TrainState
from dtl.config import Config
from dtl.config.own import is_function, needs_record, note_made
from dtl.credentials import redact
from dtl.data.splits_of_run import content_id
from dtl.errors import UserError
from dtl.intervals import shown
from dtl.models.build import Network
from dtl.models.model_json import read_model_json
from dtl.runs.folder import RunFolder, read_status
from dtl.runs.looks import describe_look, note_look
from dtl.runs.predictions import NAME as PREDICTIONS
from dtl.runs.predictions import ImagePredictions, write_predictions
from dtl.text import counted
from dtl.training.build import delivered
from dtl.training.loop import Trainer
from dtl.training.phases import Phase, top1_interval
from dtl.training.session import Session
from dtl.version import __version__

MakeReport = Callable[[Path, Callable[[str], None]], Path]
"""Makes the pages about a run folder and returns the first one; its messages go to the function."""


def is_at_end(state: TrainState, phases: Sequence[Phase]) -> bool:
    """No step is left to train."""
    last = phases[-1]
    return state.phase.index == last.index and (state.phase.step >= last.num_steps or state.phase.ended)


def is_finished(session: Session, state: TrainState, phases: Sequence[Phase]) -> bool:
    """Nothing is left to train, and the last start wrote that down: its model folder is whole."""
    # A start that failed before it began (a mistyped option) has kept what the status has of the finished run.
    return session.runtime.agree(is_at_end(state, phases) and session.runtime.is_main and read_status(session.folder.path).model is not None)


def show_result_again(session: Session, state: TrainState) -> None:
    """A finished run started again prints its result and changes nothing (main process). UserError where its weights are not those that it wrote."""
    folder, console = session.folder, session.console
    with session.runtime.together("model"):
        if session.runtime.is_main:
            check_model_folder(folder.path / "model", log=console.print)
    if not session.runtime.is_main:
        return
    _note_own(folder.path, session.config, console.print)
    status = read_status(folder.path)
    solved = list(session.config.phases.values())[-1].optimizer == "solve"
    longer = "its head is solved, which no more steps improve" if solved else "to train longer, raise the epochs of the last phase"
    console.print(f"{folder.path} is finished (step {state.step}); {longer}")
    console.table(table_rows(status.phases, status.test))
    if status.test is not None:
        console.print(test_line(status.test, folder.path))
    folder.write_status("done", step=state.step, phases=status.phases, model=status.model, test=status.test)
    session.store.thin()  # a kill may have come between the two at the end of an earlier start
    page = folder.path / "report" / "index.html"
    for line in next_steps(folder.path, session.config, page if page.is_file() else None):
        console.print(line)


def _note_own(run: Path, config: Config, log: Callable[[str], None]) -> None:
    """A run of before dtl recorded whose runs are whose: the user has just named all that it names."""
    with contextlib.suppress(OSError):
        if needs_record(config) and (run / "config.yaml").read_bytes() == config.to_yaml().encode():
            note_made(run / "config.yaml", log)
            if is_function(config.model.name):
                note_made(run / "model" / "model.json", log)


def publish(session: Session, trainer: Trainer, report: MakeReport | None) -> None:
    """Model folder and status: the run is done, and the ranks part. What is left is the main process's: table, report, what to do next."""
    config, folder, runtime, tracker, step = session.config, session.folder, session.runtime, trainer.tracker, trainer.state.step
    session.store.close()
    session.heart.enter("finish")
    seen: dict[str, Any] | None = None
    model, results = folder.path / "model", trainer.state.results.phases
    with runtime.together("model"):
        if runtime.is_main:
            _save_model(trainer, model, folder, config)
            if is_function(trainer.network.name):
                note_made(model / "model.json", tracker.print)
            seen = None if trainer.test is None else {**trainer.test, **_look(trainer, folder.path)}
            folder.write_status("done", step=step, phases=results, model=str(model), test=seen)
    # A report, or the network to wandb, may take minutes: the other ranks leave, and nothing that comes can fail or hang for their sake.
    session.heart.part()
    runtime.barrier()  # no rank looks for another any more
    runtime.close()
    if runtime.is_main:
        session.store.thin()
        tracker.table(table_rows(results, seen))
        if seen is not None:
            tracker.print(test_line(seen, folder.path))
        if worse := fell_behind(results, lr=trainer.phases[-1].config.lr):
            tracker.print(worse)
        page = None if report is None or config.run.debug or not config.tracking.report else _make_report(report, folder.path, tracker.print)
        tracker.attach(None if page is None else page.parent, model if config.tracking.wandb_model else None, step=step)
    tracker.close("done")
    if runtime.is_main:
        for line in next_steps(folder.path, config, page):
            tracker.print(line)


def _make_report(report: MakeReport, run: Path, log: Callable[[str], None]) -> Path | None:
    """The run is done and safe: whatever may be wrong with its pictures is only printed."""
    try:
        return report(run, log)
    except Exception as error:
        log(f"the report could not be made ({type(error).__name__}: {error}); run dtl report {quote(str(run))} to try again")
        return None


def table_rows(results: Sequence[dict[str, Any]], test: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The closing table. `interval`: the 95 % Wilson interval of top1, in percent. `looks`: of how many evaluations the kept one was chosen.

    `test`: what the last phase's weights came to on the test set."""
    rows = []
    for row in results:
        val = row["val"] or {}
        interval = shown(top1_interval(row["task"], {**val, **{name: row[name] for name in ("top1_interval",) if name in row}})).replace(" to ", "-") or None
        blended = None if row.get("blend") is None else f"blend {row['blend']:g}"
        epoch = blended or ("before" if row["kept_epoch"] is None and row["kept_step"] is not None else row["kept_epoch"])
        rows.append({**row, "kept_epoch": epoch, "val_loss": val.get("loss"), "top1": val.get("top1"), "interval": interval})
    return rows if test is None else [*rows[:-1], {**rows[-1], "test_top1": test.get("top1")}]


def test_line(test: Mapping[str, Any], run: Path) -> str:
    """The result on the test set, and how often it has been looked at."""
    images, look = counted(test["num_samples"], "sample"), describe_look(test.get("look"), run.parent)
    within = shown(top1_interval("classify", test))
    return f"test  loss {test['loss']:.4f}  top1 {test['top1']:.2%}{f', 95 % interval {within} %' if within else ''}  ({images}; {look})"


def _look(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Which test set this was, and how many looks at it there have been."""
    assert trainer.loaders.test is not None
    content, weights = content_id(trainer.loaders.test), read_model_json(run / "model").weights
    assert weights is not None
    return {"content": content, "look": note_look(run, content, weights=weights.sha256, step=trainer.state.step)}


def fell_behind(results: Sequence[dict[str, Any]], *, lr: float) -> str | None:
    """The line for a last phase that ended more than a point of top1 below an earlier one: what it learned cost what was there."""
    scored = [row for row in results if row["task"] == "classify" and (row["val"] or {}).get("top1") is not None]
    if len(scored) < 2 or scored[-1] is not results[-1]:
        return None
    last, best = scored[-1], max(scored[:-1], key=lambda row: row["val"]["top1"])
    if last["val"]["top1"] >= best["val"]["top1"] - 0.01:
        return None
    name = last["phase"]
    return (
        f"phase {name} ended below phase {best['phase']} ({100 * last['val']['top1']:.1f} % after {100 * best['val']['top1']:.1f} %): a rate of {lr:g} "
        f"may be too high for these weights; try --phases.{name}.lr {lr / 10:g}, --phases.{name}.layer-decay 0.7, or leave out {name}"
    )


def next_steps(run: Path, config: Config, page: Path | None) -> list[str]:
    lines = [f"report       {page}"] if page else []
    lines += [
        f"model        {run}/model (model.safetensors, model.json)",
        f"history      {run}/history.jsonl",
        f"checkpoints  {run}/checkpoints",
    ]
    if config.data.train == "digits":
        lines.append("next         your own images: dtl train --config finetune --data.train FOLDER --data.val-fraction 0.15")
    elif list(config.phases.values())[-1].optimizer == "solve":
        lines.append("next         train the whole network (--config finetune), or take another one (--model.name), each with --run.name NEW")
    else:
        lines.append("next         more epochs on the last phase, or another run with --run.name NEW")
    return lines


def _save_model(trainer: Trainer, model: Path, folder: RunFolder, config: Config) -> None:
    network, train = trainer.network, trainer.loaders.train
    last = trainer.state.results.phases[-1]
    # Before the model folder, which names them: whoever reads in between finds that they are of other weights.
    predictions = None if trainer.predictions is None else _write_predictions(folder.path, trainer.predictions, trainer.loaders.val.dataset_id)
    save_model_folder(
        model,
        network.module.state_dict(),
        architecture=architecture(network),
        classes=list(trainer.phases[-1].task.class_names(train.classes)),
        display_names=dict(train.manifest.display_names),
        preprocessing=preprocessing(network, trainer),
        metrics={
            "phase": last["phase"],
            **(last["val"] or {}),
            "top1_interval": last.get("top1_interval"),
            **({} if trainer.test is None else {"test": trainer.test}),
        },
        made_by={
            "run": str(folder.path),
            "step": trainer.state.step,
            "precision": trainer.runtime.precision,
            "dtl": __version__,
            "torch": torch.__version__,
            "data": train.dataset_id,
            "preprocessing": dict(delivered(config, network.preprocessing).origins),
            "predictions": predictions,
            "settings": redact(config.to_dict()),
        },
    )


def _write_predictions(run: Path, predictions: ImagePredictions, data: str) -> dict[str, Any]:
    try:
        return write_predictions(run, predictions, data=data)
    except OSError as error:
        raise UserError(f"{run / PREDICTIONS} cannot be written: {error.strerror or error}") from error


def architecture(network: Network) -> dict[str, Any]:
    return {"name": network.name, "num_classes": network.num_outputs, "options": network.options}


def preprocessing(network: Network, trainer: Trainer) -> dict[str, Any]:
    """What an image must go through before this network, as evaluation did it."""
    return {
        **replace(network.preprocessing, image_size=trainer.loaders.image_size).to_json(),
        "transform": json.loads(json.dumps(trainer.loaders.val_transform.describe())),
    }
