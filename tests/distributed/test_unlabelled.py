"""Images without labels: a rotation pretext on them, and a classifier that begins with what it has learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from harness import history, run, status
from PIL import Image
from recipes import write_images, write_recipe

from dtl.training.phases import TASKS

PRETEXT: dict[str, Any] = {"pretext": {"task": "rotate", "train": "all", "steps": 3, "lr": 0.05}}


def loose_images(folder: Path, count: int) -> Path:
    """Half of them in folders of their own, as cameras leave them."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / (f"2024/{number:02d}" if number % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(place / f"{number}.jpg")
    return folder


def test_a_pretext_on_loose_images_then_a_classifier(tmp_path: Path) -> None:
    photos = loose_images(tmp_path / "photos", 24)
    data = {"train": str(photos), "val_fraction": 0.25, "global_batch_size": 6}
    pretext = write_recipe(tmp_path, "pretext", phases=PRETEXT, data=data)
    job = run(["--config", str(pretext)], cwd=tmp_path, world=2)
    assert "(24 images of 1 class)" in job.err()
    lines = [event for event in history(tmp_path / "runs/pretext") if event["event"] == "val"]
    assert lines[-1]["num_samples"] == 4 * 6, "each image four times"
    facts = json.loads((tmp_path / "runs/pretext/model/model.json").read_text())
    assert facts["classes"] == list(TASKS["rotate"].class_names(["unlabelled"]))
    assert len(facts["classes"]) == 4

    labelled = {"train": str(write_images(tmp_path / "labelled", {"ant": 8, "bee": 8})), "val_fraction": 0.25, "global_batch_size": 6}
    phases = {"all": {"train": "all", "steps": 2, "lr": 0.05}}
    recipe = write_recipe(tmp_path, "after", phases=phases, data=labelled, transfer={"source": "runs/pretext"})
    run(["--config", str(recipe)], cwd=tmp_path)
    assert status(tmp_path / "runs/after")["state"] == "done"


def test_a_classifier_does_not_learn_from_images_without_labels(tmp_path: Path) -> None:
    photos = loose_images(tmp_path / "photos", 12)
    recipe = write_recipe(tmp_path, phases={"all": {"train": "all", "steps": 2, "lr": 0.05}}, data={"train": str(photos), "val_fraction": 0.25})
    job = run(["--config", str(recipe)], cwd=tmp_path, code=2)
    assert "has only one class, '2024'" in job.err()
    run(["photos", "shards", "--unlabelled", "--val-fraction", "0.25"], cwd=tmp_path, command="pack")
    job = run(["--config", str(recipe), "--data.train", "shards", "--data.val-fraction", "0"], cwd=tmp_path, world=2, code=2)
    (line,) = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert "shards has only one class, 'unlabelled'; a classifier needs at least two" in line
