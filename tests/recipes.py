"""A recipe that runs through everything in a few seconds, and what tests ask of its run folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

RECIPE: dict[str, Any] = {
    "data": {"train": "digits", "image_size": 16, "global_batch_size": 120, "workers": 1, "augment": {"preset": "cifar", "erasing": 0.3}},
    "model": {"name": "networks:small"},
    "phases": {
        "pretext": {"task": "rotate", "train": "all", "steps": 5, "lr": 0.05},
        "head": {"train": "head", "steps": 4, "lr": 0.1, "optimizer": "adamw"},
        "all": {"train": "all", "epochs": 1.5, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "weight_decay": 0.001, "clip_norm": 5.0, "eval_every": 0.5},
    },
    "checkpoint": {"every_steps": 3},
    "precision": "no",
    "tracking": {"wandb": "off", "log_every": 2, "report": False},
}


def write_recipe(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """The recipe as folder/NAME.yaml; sections are merged in, `phases` replaces the phases."""
    recipe = json.loads(json.dumps(RECIPE))
    for section, values in sections.items():
        if isinstance(values, dict) and section != "phases":
            recipe[section] = {**recipe.get(section, {}), **values}
        else:
            recipe[section] = values
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def write_images(folder: Path, classes: dict[str, int], *, seed: int = 0) -> Path:
    """A folder of small random images, `classes` of so many each."""
    generator = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def dies_solving() -> None:
    """`before` a rank: it is killed in the middle of its first solved head."""
    from dtl.optim import solve

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    solve._Problem._product = die  # type: ignore[assignment, method-assign]


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()
