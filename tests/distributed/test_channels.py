"""Images of five channels (.npy) and of two (TIFF with two pages): training, evaluation, prediction and export see all of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from harness import history, run
from recipes import write_recipe

import dtl


def write_arrays(folder: Path, *, per_class: int, seed: int) -> None:
    """Noise in all channels; the class is a block in the last one."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            values = rng.integers(0, 80, (20, 24, 5)).astype(np.uint8)
            values[4:16, 2 + 12 * label : 10 + 12 * label, 4] += 160
            np.save(folder / name / f"{number}.npy", values if number % 2 else np.ascontiguousarray(values.transpose(2, 0, 1)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what the run has printed."""
    folder = tmp_path_factory.mktemp("five")
    write_arrays(folder / "arrays/train", per_class=24, seed=0)
    write_arrays(folder / "arrays/val", per_class=10, seed=1)
    data = {"train": "arrays", "image_size": 32, "fit": "pad", "channels": 5, "global_batch_size": 16, "workers": 1, "augment": {"preset": "none"}}
    phases = {"all": {"train": "all", "epochs": 8, "lr": 0.05}}
    recipe = write_recipe(folder, "five", data=data, phases=phases, model={"name": "dtl/resnet_tiny"}, tracking={"report": True})
    return folder, run(["--config", str(recipe)], cwd=folder).err()


def test_the_network_sees_the_last_channel(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert max(event["top1"] for event in history(folder / "runs/five") if event["event"] == "val") == 1.0
    assert "(measured on the training images)" in printed
    stored = json.loads((folder / "runs/five/model/model.json").read_text())
    assert stored["preprocessing"]["pixels"]["channels"] == len(stored["preprocessing"]["mean"]) == 5
    assert stored["preprocessing"]["mean"][4] > stored["preprocessing"]["mean"][0] > 0.1
    assert stored["architecture"]["options"] == {"in_chans": 5}
    assert (folder / "runs/five/report/index.html").is_file()


def test_evaluation_prediction_and_export_see_the_same(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    stored = json.loads((folder / "runs/five/model/model.json").read_text())
    run(["runs/five", "--json", "seen.json", "--workers", "0"], cwd=folder, command="evaluate")
    measured = json.loads((folder / "seen.json").read_text())
    assert measured["top1"] == stored["metrics"]["top1"]
    assert measured["loss"] == pytest.approx(stored["metrics"]["loss"], rel=1e-5)
    run(["runs/five", "arrays/val", "--out", "p.csv", "--workers", "0"], cwd=folder, command="predict")
    with (folder / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert np.mean([f"/{row['label']}/" in row["path"] for row in rows]) == stored["metrics"]["top1"]
    (found,) = dtl.predict(folder / "runs/five", np.moveaxis(np.load(folder / "arrays/val/left/0.npy"), 0, 2))
    assert found["label"] == next(row["label"] for row in rows if row["path"].endswith("left/0.npy"))
    run(["runs/five", "--to", "safetensors", "--out", "five.safetensors"], cwd=folder, command="export")
    described = json.loads((folder / "five.safetensors.json").read_text())
    assert described["input"]["shape"] == ["batch", 5, 32, 32]
    assert described["input"]["channels"] == 5


def test_what_has_other_channels_is_refused(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    job = run(["--config", "five.yaml", "--data.channels", "4", "--run.name", "four"], cwd=folder, code=2)
    assert "mean and std of 4 channels cannot be measured: train/" in job.err()
    assert "it has 5 channels, and data.channels is 4" in job.err()
