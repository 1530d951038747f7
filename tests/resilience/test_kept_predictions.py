"""predictions.npy: what the delivered weights predicted in the evaluation that the headline is of; each image once, at any world size, through any kill."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import history, run, start, status, steps_done, wait_for
from page_reader import Page
from recipes import write_recipe

from dtl.data.open import ensure_packed
from dtl.data.shards.index import Shards
from dtl.intervals import wilson
from dtl.report.style import percent

# It gets worse after its best evaluation, whose weights are kept.
FALLS = {"train": "all", "epochs": 3, "lr": 1.0, "schedule": "constant", "warmup": 3, "eval_every": 0.5}


def train(folder: Path, phase: dict[str, Any], *, world: int = 1, kill_at: int | None = None, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    phases = {"head": {"train": "head", "steps": 4, "lr": 0.1}, "all": phase}
    recipe = write_recipe(folder, phases=phases, data={"workers": 0}, **{"checkpoint": {"every_steps": 3}, **sections})
    if kill_at is not None:
        job = start(["--config", str(recipe)], cwd=folder, world=world)
        wait_for(lambda: steps_done(folder / "runs/tiny") >= kill_at or None, what=f"step {kill_at}")
        job.kill()
    run(["--config", str(recipe)], cwd=folder, world=world)
    return folder / "runs/tiny"


def check(folder: Path, *, precision: str = "no") -> np.ndarray:
    """Status, history, model.json, predictions.npy, the report and `dtl evaluate` are of the same weights. Returns the rows."""
    kept, facts = status(folder)["phases"][-1], json.loads((folder / "model/model.json").read_text())
    rows = np.load(folder / "predictions.npy")
    shards = Shards.open(ensure_packed("digits", split="val", progress=False, log=lambda line: None))
    assert rows["sample"].tolist() == list(range(360))
    assert rows["label"].tolist() == shards.labels.tolist()
    assert facts["metrics"] == {"phase": "all", **kept["val"], "top1_interval": kept["top1_interval"]}
    assert kept["top1_interval"] == list(wilson(kept["val"]["top1"], 360) or ())
    (event,) = [event for event in history(folder) if event["event"] == "val" and event["step"] == kept["kept_step"] and event["phase"] == "all"]
    assert (event["top1"], event["loss"], event["num_samples"]) == (kept["val"]["top1"], kept["val"]["loss"], 360)
    assert (rows["label"] == rows["predicted"]).mean() == event["top1"]
    assert rows["loss"].astype(np.float64).mean() == pytest.approx(event["loss"], rel=1e-12)
    words = [str(folder), "--csv", "images.csv", "--json", "evaluation.json", "--precision", precision]  # a CPU without bf16 takes float32 by itself
    run(words, cwd=folder.parent.parent, command="evaluate")
    with (folder.parent.parent / "images.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [row["prediction"] for row in again] == [shards.classes[k] for k in rows["predicted"]]
    np.testing.assert_allclose([float(row["loss"]) for row in again], rows["loss"], rtol=1e-3, atol=1e-5)
    assert json.loads((folder.parent.parent / "evaluation.json").read_text())["top1"] == event["top1"]
    return rows


def check_report(folder: Path) -> None:
    top1 = json.loads((folder / "model/model.json").read_text())["metrics"]["top1"]
    page = Page.read(folder / "report/index.html")
    for row in status(folder)["phases"]:  # the run's own table, and the page's
        assert f"{row['kept_epoch']} {row['train_loss']:.4f} {row['val']['loss']:.4f} {row['val']['top1']:.2%}".replace("%", " %") in page.text
    shown = percent(top1, 2).replace("\u00a0", " ")
    assert page.text.count(f"{shown} top-1") == 1  # the headline
    assert f"all 360 validation images: top-1 {shown}" in page.text
    assert any(f"{percent(top1)} are on the diagonal" in image["alt"] for image in page.images)
    assert "Counted over 360 of 360 validation images" in page.text


@pytest.mark.parametrize("world", [1, 2])
def test_predictions_are_those_of_the_best_weights(tmp_path: Path, world: int) -> None:
    folder = train(tmp_path / "whole", FALLS, world=world, checkpoint={"every_steps": 3, "monitor": "loss"}, tracking={"report": True})
    best = status(folder)["phases"][-1]["kept_step"]
    assert best < 34
    check(folder)
    check_report(folder)
    # Killed after that evaluation, and resumed from a checkpoint that has it: the same file.
    killed = train(tmp_path / "killed", FALLS, world=world, kill_at=best + 4, checkpoint={"every_steps": 3, "monitor": "loss"})
    assert (killed / "predictions.npy").read_bytes() == (folder / "predictions.npy").read_bytes()


def test_of_the_last_weights_of_an_average_and_of_an_early_end(tmp_path: Path) -> None:
    cases = {"last": {"keep": "last", "ema": 0.9}, "early": {"early_stop": {"patience": 1}}, "average": {"ema": 0.9}}
    for name, more in cases.items():
        folder = train(tmp_path / name, {**FALLS, **more})
        rows = check(folder)
        if name == "last":
            assert status(folder)["phases"][-1]["kept_step"] == status(folder)["step"] == 40
        if name == "early":
            assert status(folder)["phases"][-1]["kept_step"] < status(folder)["step"] < 40
        assert len(rows) == 360


def test_more_epochs_replace_them_and_a_fresh_start_removes_them(tmp_path: Path) -> None:
    phase = {"train": "all", "steps": 6, "lr": 0.05}
    folder = train(tmp_path, phase)
    first = (folder / "predictions.npy").read_bytes()
    train(tmp_path, {**phase, "steps": 20})
    assert (folder / "predictions.npy").read_bytes() != first
    check(folder)
    recipe = write_recipe(tmp_path, phases={"all": phase}, data={"workers": 0}, run={"resume": "never"})
    job = start(["--config", str(recipe)], cwd=tmp_path)
    wait_for(lambda: not (folder / "predictions.npy").exists() or None, what="an empty folder")
    job.wait().check()
    assert (folder / "predictions.npy").exists()


def test_a_report_without_its_data_still_has_the_numbers_and_one_with_others_predictions_has_not(tmp_path: Path) -> None:
    folder = train(tmp_path, {"train": "all", "steps": 6, "lr": 0.05}, tracking={"report": True})
    check_report(folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("train: digits", "train: gone"))
    job = run([str(folder)], cwd=tmp_path, command="report")
    assert "gone" in job.err()
    check_report(folder)
    (folder / "config.yaml").write_text(config)
    rows = np.load(folder / "predictions.npy")
    rows["predicted"] = 0
    np.save(folder / "predictions.npy", rows)
    job = run([str(folder)], cwd=tmp_path, command="report")
    assert "predictions.npy is not the file that model.json is about (another SHA-256)" in job.err()
    assert "There is no predictions.npy of these weights. The model was evaluated on all 360 validation images" in Page.read(folder / "report/index.html").text


@pytest.mark.parametrize("case", ["bf16", "cached features"])
def test_in_the_precision_of_the_run_and_from_cached_features(tmp_path: Path, case: str) -> None:
    if case == "bf16":
        folder = train(tmp_path, {"train": "all", "steps": 12, "lr": 0.05}, precision="bf16")
        assert json.loads((folder / "model/model.json").read_text())["made_by"]["settings"]["precision"] == "bf16"
    else:
        folder = train(tmp_path, {"train": "head", "epochs": 2, "lr": 0.05, "cache_features": True})
        assert list(tmp_path.glob("cache/**/features/*/val.npy"))
    check(folder, precision="bf16" if case == "bf16" else "no")
