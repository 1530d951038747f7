"""What comes after a training, and before: the learning rate's range, evaluation, prediction, export."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from harness import history, run
from recipes import write_images, write_recipe

PHASES = {"all": {"train": "all", "epochs": 1, "lr": 0.05}}


def test_the_range_of_learning_rates(tmp_path: Path, device: str) -> None:
    curves = {}
    for on in ("cpu", device):
        recipe = write_recipe(tmp_path, phases=PHASES)
        run(["--config", str(recipe), "--phase", "all", "--steps", "12", "--out", on], cwd=tmp_path, command="find-lr", device=on)
        curves[on] = json.loads((tmp_path / on / "tiny-all.json").read_text())["losses"]
    assert curves[device][:6] == pytest.approx(curves["cpu"][:6], rel=1e-3)


def test_a_model_is_evaluated_predicts_and_is_exported(tmp_path: Path, device: str) -> None:
    """With the numbers of its training, and of a CPU."""
    images = write_images(tmp_path / "images", {"one": 20, "two": 24})
    data = {"train": str(images), "val_fraction": 0.25, "global_batch_size": 11}
    run(["--config", str(write_recipe(tmp_path, phases=PHASES, data=data))], cwd=tmp_path)
    (validated,) = [event for event in history(tmp_path / "runs/tiny") if event["event"] == "val"]
    predicted = []
    for on in ("cpu", device):
        run(["runs/tiny", "--json", "found.json"], cwd=tmp_path, command="evaluate", device=on)
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["loss"], found["top1"]) == pytest.approx((validated["loss"], validated["top1"]), rel=1e-3)
        run(["runs/tiny", str(images), "--out", "labels.csv"], cwd=tmp_path, command="predict", device=on)
        predicted.append(list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines())))
    for row, other in zip(*predicted, strict=True):
        assert (row["path"], row["name"]) == (other["path"], other["name"])
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-3)
    assert len(predicted[0]) == 44
    run(["runs/tiny", "--to", "torch-export", "--out", "model.pt2"], cwd=tmp_path, command="export")
    assert (tmp_path / "model.pt2").is_file()
