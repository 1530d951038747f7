"""The beginning and the end of a run's folder: config.yaml, transfer.json, status.json, the model folder, the closing table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dtl.checkpoint.resume.model_folder import save_model_folder
from dtl.checkpoint.resume.state import TrainState
from dtl.checkpoint.transfer.report import TransferReport
from dtl.config import Config
from dtl.distributed.runtime import Runtime
from dtl.files import write_whole
from dtl.models.build import Network
from dtl.runs.folder import RunFolder, read_status
from dtl.runs.tracker import Console
from dtl.text import counted
from dtl.training.loop import Trainer
from dtl.training.phases import Phase
from dtl.training.redact import without_secrets
from dtl.training.start import remarks
from dtl.version import __version__

# From this many starts at one step on, status.json says that there is no progress.
STARTS_WITHOUT_PROGRESS = 3


def begin(trainer: Trainer, folder: RunFolder, config: Config, report: TransferReport | None) -> None:
    """Write down what this start is (main process)."""
    trainer.state.incarnation = folder.incarnation
    starts = trainer.runtime.agree(folder.count_starts(trainer.state.step) if trainer.runtime.is_main else 0)
    if not trainer.runtime.is_main:
        return
    write_whole(folder.path / "config.yaml", lambda file: file.write(config.to_yaml().encode()))
    if report is not None:
        report.to_json(folder.path / "transfer.json")
    stuck = (
        ""
        if starts <= STARTS_WITHOUT_PROGRESS
        else (
            f"start number {starts} in a row at step {trainer.state.step}, without a new checkpoint: give each start more time, "
            "or save more often (--checkpoint.every_steps)"
        )
    )
    folder.write_status("running", why=stuck, step=trainer.state.step)
    if stuck:
        trainer.tracker.say(stuck)
    state, runtime = trainer.state, trainer.runtime
    done = f"; going on at step {state.step}" if state.step else ""
    trainer.tracker.say(
        f"run {folder.path}: {trainer.feeds.train.num_samples:,} training and {counted(trainer.feeds.val.num_samples, 'validation image')} of "
        f"{counted(trainer.feeds.train.num_classes, 'class')}, {trainer.network.name}, {counted(runtime.world_size, 'process')} on "
        f"{runtime.device.type}, precision {runtime.precision}{done}"
    )
    for line in remarks(trainer.phases, trainer.feeds, runtime):
        trainer.tracker.say(line)


def is_finished(folder: RunFolder, state: TrainState, phases: Sequence[Phase], runtime: Runtime) -> bool:
    """Nothing is left to train, and the last start said so: its model folder is whole."""
    last = phases[-1]
    at_end = state.phase_index == last.index and (state.phase_step >= last.num_steps or bool(state.extra.get("ended")))
    # A start that failed before it began (a mistyped option) has kept what the status said of the finished run.
    status = read_status(folder.path) if runtime.is_main else None
    return runtime.agree(at_end and "model" in (status or {}))


def tell_result_again(folder: RunFolder, state: TrainState, config: Config, runtime: Runtime, console: Console) -> int:
    """A finished run started again prints its result and changes nothing."""
    if runtime.is_main:
        status = read_status(folder.path) or {}
        console.say(f"{folder.path} is finished (step {state.step}); more epochs on the last phase go on with it")
        console.table(table_rows(status.get("phases", [])))
        folder.write_status("done", step=state.step, **{key: status[key] for key in ("phases", "model") if key in status})
        page = folder.path / "report" / "index.html"
        for line in next_steps(folder.path, config, page if page.is_file() else None):
            console.say(line)
    return 0


def end(trainer: Trainer, folder: RunFolder, config: Config) -> None:
    """Model folder and status: the run is done, and the ranks part. What is left is the main process's: table, report, what to do next."""
    state, tracker, runtime = trainer.state, trainer.tracker, trainer.runtime
    model = folder.path / "model"
    with runtime.together("model"):
        if runtime.is_main:
            _save_model(trainer, model, folder, config)
            folder.write_status("done", step=state.step, phases=trainer.numbers(), model=str(model))
    # A report, or the network to wandb, may take minutes: the other ranks leave, and nothing that comes can fail or hang for their sake.
    trainer.heart.part()
    runtime.barrier()  # no rank looks for another any more
    runtime.close()
    if runtime.is_main:
        tracker.table(table_rows(trainer.numbers()))
        worse = fell_behind(trainer.numbers(), lr=trainer.phases[-1].config.lr)
        if worse:
            tracker.say(worse)
        page = _make_report(folder, config, tracker.say)
        tracker.attach(None if page is None else page.parent, model if config.tracking.wandb_model else None, step=state.step)
    tracker.close("done")
    if runtime.is_main:
        for line in next_steps(folder.path, config, page):
            tracker.say(line)


def _make_report(folder: RunFolder, config: Config, say: Callable[[str], None]) -> Path | None:
    """The run is done and safe: whatever may be wrong with its pictures is only said."""
    if not config.tracking.report or config.run.debug:
        return None
    from dtl.report import make_report

    try:
        return make_report(folder.path, say=say)
    except Exception as error:
        say(f"the report could not be made ({type(error).__name__}: {error}); dtl report {folder.path} tries again")
        return None


def table_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "val_loss": (row["val"] or {}).get("loss"), "top1": (row["val"] or {}).get("top1")} for row in results]


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
        f"may be too much for these weights; try --phases.{name}.lr {lr / 10:g}, --phases.{name}.layer-decay 0.7, or the run without {name}"
    )


def next_steps(run: Path, config: Config, page: Path | None) -> list[str]:
    lines = [f"report       {page}"] if page else []
    lines += [
        f"model        {run}/model (model.safetensors, model.json)",
        f"history      {run}/history.jsonl",
        f"checkpoints  {run}/checkpoints",
    ]
    if config.data.train == "digits":
        lines.append("next         your own images: accelerate launch dtl/train.py --config finetune --data.train FOLDER --data.val FOLDER")
    else:
        lines.append("next         more epochs on the last phase, or another run with --run.name NEW")
    return lines


def _save_model(trainer: Trainer, model: Path, folder: RunFolder, config: Config) -> None:
    network, train = trainer.network, trainer.feeds.train
    last = trainer.numbers()[-1]
    save_model_folder(
        model,
        network.module.state_dict(),
        architecture=architecture(network),
        classes=list(trainer.phases[-1].task.class_names(train.classes)),
        display_names=dict(train.manifest.display_names),
        preprocessing=preprocessing(network, config, trainer),
        metrics={"phase": last["phase"], **(last["val"] or {})},
        made_by={
            "run": str(folder.path),
            "step": trainer.state.step,
            "precision": trainer.runtime.precision,
            "dtl": __version__,
            "torch": torch.__version__,
            "data": train.dataset_id,
            "settings": without_secrets(config.to_dict()),
        },
    )


def architecture(network: Network) -> dict[str, Any]:
    return {"name": network.name, "num_classes": network.num_outputs, "options": network.options}


def preprocessing(network: Network, config: Config, trainer: Trainer) -> dict[str, Any]:
    """What an image must go through before this network, as evaluation did it."""
    return {
        **asdict(network.preprocessing),
        "image_size": config.data.image_size,
        "crop_ratio": network.preprocessing.crop_ratio if config.data.crop_ratio == "auto" else config.data.crop_ratio,
        "transform": json.loads(json.dumps(trainer.feeds.val_transform.describe())),
    }
