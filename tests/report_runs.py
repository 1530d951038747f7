"""Run folders for the report's tests, made in a moment: the files that a run writes, with a history that follows its config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dtl.checkpoint.resume.model_folder import save_model_folder
from dtl.config import Config, config_from_dict
from dtl.config.own import note_made
from dtl.data.open import ensure_packed
from dtl.data.shards.index import Shards
from dtl.models.build import build

STEPS_PER_EPOCH = 12  # of the digits' 1,437 training images, 120 at once
PHASES: dict[str, Any] = {
    "pretext": {"task": "rotate", "train": "all", "epochs": 2, "lr": 0.05},
    "head": {"train": "head", "epochs": 1, "lr": 0.1, "mixup": 0.4},
    "all": {"train": "all", "epochs": 3, "lr": 0.01},
}


def make_config(name: str = "made", *, phases: dict[str, Any] | None = None, seed: int = 0, **data: Any) -> Config:
    values = {
        "run": {"name": name, "seed": seed, "device": "cpu"},
        "data": {"train": "digits", "image_size": 16, "global_batch_size": 120, "workers": 0, "augment": {"preset": "cifar"}, **data},
        "model": {"name": "networks:small"},
        "phases": phases or PHASES,
        "precision": "no",
        "tracking": {"wandb": "off", "log_every": 5},
    }
    return config_from_dict(values, "the test's config")


def make_run(folder: Path, config: Config | None = None, *, model: bool = True, steps_per_epoch: int = STEPS_PER_EPOCH) -> Path:
    """A finished run in `folder`: config.yaml, history.jsonl, status.json and, with `model`, an untrained model folder."""
    config = config or make_config(folder.name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    events = list(make_events(config, steps_per_epoch=steps_per_epoch))
    write_history(folder, events)
    rows = [{"phase": name, "epochs": phase.epochs, "seconds": 65.0} for name, phase in config.phases.items()]
    (folder / "status.json").write_text(json.dumps({"state": "done", "step": events[-1]["step"], "phases": rows}))
    note_made(folder / "config.yaml", print)
    if model:
        make_model(folder, config)
        note_made(folder / "model" / "model.json", print)
    return folder


def make_model(folder: Path, config: Config) -> None:
    """A model folder as the run's end writes it."""
    torch.manual_seed(0)
    train = Shards.open(ensure_packed(str(config.data.train), config.data, split="train", progress=False, log=lambda line: None))
    classes = ["0°", "90°", "180°", "270°"] if list(config.phases.values())[-1].task == "rotate" else list(train.classes)
    network = build(config.model.name, num_classes=len(classes), own=True)
    save_model_folder(
        folder / "model",
        network.module.state_dict(),
        architecture={"name": network.name, "num_classes": len(classes), "options": {}},
        classes=classes,
        display_names={},
        preprocessing={**network.preprocessing.to_json(), "image_size": config.data.image_size},
        metrics={},
        made_by={"run": str(folder), "data": train.dataset_id},
    )


def write_history(folder: Path, events: list[dict[str, Any]]) -> None:
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def make_events(config: Config, *, steps_per_epoch: int = STEPS_PER_EPOCH, log_every: int = 5) -> Iterator[dict[str, Any]]:
    """What the loop would tell: a train line every `log_every` steps and at a phase's end, an evaluation after each epoch and at its end."""
    step = first_epoch = 0
    for name, phase in config.phases.items():
        num_steps = phase.steps or max(1, round((phase.epochs or 1) * steps_per_epoch))
        for phase_step in range(1, num_steps + 1):
            step += 1
            common = {"phase": name, "epoch": first_epoch + (phase_step - 1) // steps_per_epoch, "step": step}
            done = phase_step / num_steps
            loss = 2.5 * math.exp(-2 * done) + 0.1 * math.sin(step)
            if step % log_every == 0 or phase_step == num_steps:
                lr = phase.lr * (1 + math.cos(math.pi * done)) / 2
                yield {"event": "train", **common, "loss": loss, "lr": lr, "images_per_second": 500.0, "data_wait": 0.01}
            if phase_step % steps_per_epoch == 0 or phase_step == num_steps:
                top1 = 0.9 * done + 0.001 * config.run.seed
                yield {"event": "val", **common, "loss": loss + 0.1, "top1": top1, "top5": 0.99, "num_samples": 360}
        first_epoch += -(-num_steps // steps_per_epoch)
