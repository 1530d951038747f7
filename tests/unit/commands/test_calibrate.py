"""`dtl calibrate`: what it stores is used by evaluate, predict and export, on any number of processes, and the weights stay theirs."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run, the_line
from model_folders import model_folder
from PIL import Image
from recipes import write_recipe

import dtl
from dtl.checkpoint.resume.model_folder import write_calibration
from dtl.files import sha256_of_file
from dtl.models.model_json import Calibration, Threshold, read_model_json


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny, which tells dark photos from bright ones as far as they can be told; and photos."""
    folder, random = tmp_path_factory.mktemp("trained"), np.random.Generator(np.random.PCG64(0))
    for split, number in (("train", 60), ("val", 40), ("test", 30)):
        for label, level in (("bright", 150), ("dark", 110)):
            (folder / "photos" / split / label).mkdir(parents=True)
            for image in range(number):
                pixels = random.normal(random.normal(level, 22), 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / label / f"{image}.png")
    phases = {"all": {"train": "all", "steps": 24, "lr": 0.05}}
    data = {"train": "photos/train", "val": "photos/val", "test": "photos/test", "global_batch_size": 24, "augment": {"preset": "none"}}
    run(["--config", str(write_recipe(folder, phases=phases, data=data))], cwd=folder)
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


def test_a_stored_temperature_is_used_everywhere(place: Path) -> None:
    model = place / "runs/tiny/model"
    before = sha256_of_file(model / "model.safetensors")
    raw = _predicted(place, "raw")
    old = _evaluated(place, "raw")
    found = {}
    for world in (1, 2):
        job = run(["runs/tiny", "--json", "calibration.json", "--workers", "0", "--batch-size", "7"], cwd=place, command="calibrate", world=world)
        found[world] = json.loads((place / "calibration.json").read_text())
        assert f"temperature {found[world]['temperature']:.4g}, fitted on 80 validation images" in job.out()
        assert "  60 test images:\n    loss " in job.out()
    assert found[1] == found[2], "fitted on the network's own logits each time"
    temperature = found[1]["temperature"]
    facts = json.loads((model / "model.json").read_text())
    assert facts["calibration"]["temperature"] == temperature
    assert facts["weights"]["sha256"] == sha256_of_file(model / "model.safetensors") == before
    new = _evaluated(place, "new")
    assert (old["top1"], old["confusion"], old["auroc"]) == (new["top1"], new["confusion"], pytest.approx(new["auroc"], abs=1e-3))
    assert new["loss"] < old["loss"]
    assert new["temperature"] == temperature
    assert "temperature" not in old
    test = _evaluated(place, "test", "--split", "test")
    assert test["loss"] == pytest.approx(found[1]["test"]["after"]["loss"], rel=1e-4)
    assert test["calibration_error"] == pytest.approx(found[1]["test"]["after"]["calibration_error"], abs=1e-4)
    calibrated = _predicted(place, "calibrated")
    assert [one[0] for one in raw] == [one[0] for one in calibrated], "the same answers"
    assert [one[1] for one in raw] != [one[1] for one in calibrated]

    run(["runs/tiny", "--remove"], cwd=place, command="calibrate")
    assert "calibration" not in json.loads((model / "model.json").read_text())
    assert _predicted(place, "again") == raw
    run(["--config", "tiny.yaml"], cwd=place)  # a finished run still is one


def test_an_exported_file_divides_by_the_temperature(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    write_calibration(model, Calibration(temperature=2.5, data="x", num_samples=9), read_model_json(model))
    network, metadata = dtl.load_model(model)
    assert metadata["calibration"]["temperature"] == 2.5
    file = dtl.export(model, tmp_path / "model.pt2", to="torch-export")
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(file).module()(images), network(images) / 2.5, atol=1e-4)
    assert json.loads((tmp_path / "model.pt2.json").read_text())["temperature"] == {"value": 2.5, "applied": True}
    dtl.export(model, tmp_path / "weights.safetensors", to="safetensors")
    assert json.loads((tmp_path / "weights.safetensors.json").read_text())["temperature"] == {"value": 2.5, "applied": False}


def _evaluated(place: Path, name: str, *arguments: str) -> dict[str, Any]:
    run(["runs/tiny", "--json", f"{name}.json", "--workers", "0", *arguments], cwd=place, command="evaluate")
    return json.loads((place / f"{name}.json").read_text())  # type: ignore[no-any-return]


def _predicted(place: Path, name: str, *arguments: str) -> list[tuple[str, str]]:
    run(["runs/tiny", "photos/val", "--out", f"{name}.csv", "--workers", "0", *arguments], cwd=place, command="predict")
    return [(row["label"], row["probability"]) for row in csv.DictReader((place / f"{name}.csv").read_text().splitlines())]


def test_a_threshold_decides_in_predict_and_evaluate(place: Path) -> None:
    job = run(["runs/tiny", "--threshold", "f1", "--workers", "0"], cwd=place, command="calibrate")
    assert "an image is 'dark' from this probability on; f1 " in job.out()
    model = place / "runs/tiny/model"
    stored = read_model_json(model)
    assert stored.calibration is not None
    assert stored.calibration.threshold is not None
    high = replace(stored.calibration, threshold=Threshold(criterion="f1", value=0.9))
    write_calibration(model, high, stored)
    run(["runs/tiny", "photos/val", "--out", "all.jsonl", "--top", "2", "--workers", "0"], cwd=place, command="predict")
    rows = [json.loads(line) for line in (place / "all.jsonl").read_text().splitlines()]
    for row in rows:
        dark = next(one["probability"] for one in row["predictions"] if one["label"] == "dark")
        assert row["label"] == ("dark" if dark >= 0.9 else "bright")
        assert row["predictions"][0]["label"] == row["label"]
    assert any(row["label"] == "bright" and row["probability"] < 0.5 for row in rows)
    measured = _evaluated(place, "high", "--csv", "high.csv")
    assert np.asarray(measured["confusion"])[:, 1].sum() == sum(row["label"] == "dark" for row in rows)
    assert measured["threshold"] == 0.9
    cells = list(csv.DictReader((place / "high.csv").read_text().splitlines()))
    ours, theirs = sorted((row["label"], row["probability"]) for row in rows), sorted((cell["prediction"], float(cell["probability"])) for cell in cells)
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)


def test_a_threshold_decides_for_groups_and_flipped_views(place: Path) -> None:
    """By the mean probability of a group's images and their mirror images, in predict and evaluate alike."""
    stored = read_model_json(place / "runs/tiny/model")
    threshold = Threshold(criterion="f1", value=0.7)
    write_calibration(place / "runs/tiny/model", Calibration(temperature=1.5, threshold=threshold, data="x", num_samples=9), stored)
    groups = ["--flip", "--by-group", "--group-regex", r"(bright/\d|dark/\d)"]

    def predicted(*more: str) -> dict[str, tuple[str, float]]:
        run(["runs/tiny", "photos/val", "--out", "found.jsonl", "--top", "2", "--workers", "0", *more], cwd=place, command="predict")
        rows = [json.loads(line) for line in (place / "found.jsonl").read_text().splitlines()]
        return {row["path"]: (row["label"], next(one["probability"] for one in row["predictions"] if one["label"] == "dark")) for row in rows}

    flipped, found = predicted("--flip"), predicted(*groups)
    for probabilities in (flipped, found):
        assert {label for label, _ in probabilities.values()} == {"bright", "dark"}
        assert all(label == ("dark" if dark >= 0.7 else "bright") for label, dark in probabilities.values())
    assert any(0.5 <= dark < 0.7 for _, dark in flipped.values()), "the threshold decides"
    assert len(found) == 20
    for name, (_, dark) in found.items():
        assert dark == pytest.approx(np.mean([one for path, (_, one) in flipped.items() if name in path]), abs=1e-5)
    measured = _evaluated(place, "grouped", *groups)
    assert np.asarray(measured["confusion"])[:, 1].sum() == sum(label == "dark" for label, _ in flipped.values())
    right = sum(name.startswith(label) for name, (label, _) in found.items())
    assert measured["by_group"]["top1"] == pytest.approx(right / 20)
    assert np.asarray(measured["by_group"]["confusion"])[:, 1].sum() == sum(label == "dark" for label, _ in found.values())


def test_groups_of_the_run_stand_in_one_half(place: Path) -> None:
    """data.group of the run, by a column of its list: calibrate and evaluate find it there."""
    rows = [f"photos/{split}/{label}/{number}.png,{label},{split},{label}{split}{number // 10}"
            for split in ("train", "val", "test") for label in ("bright", "dark") for number in range({"train": 60, "val": 40, "test": 30}[split])]  # fmt: skip
    (place / "photos.csv").write_text("\n".join(["path,label,split,patient", *rows]) + "\n")
    data = {"train": "photos.csv", "global_batch_size": 24, "augment": {"preset": "none"}, "group": {"column": "patient"}}
    phases = {"all": {"train": "all", "steps": 12, "lr": 0.05}}
    run(["--config", str(write_recipe(place, name="grouped", phases=phases, data=data))], cwd=place)
    grouped = json.loads(run(["runs/grouped", "--json", "-"], cwd=place, command="evaluate").out())
    job = run(["runs/grouped", "--json", "grouped.json", "--workers", "0"], cwd=place, command="calibrate")
    assert "fitted on 80 validation images" in job.out()
    found = json.loads((place / "grouped.json").read_text())
    assert found["val"]["before"]["loss"] == pytest.approx(grouped["loss"], rel=1e-4)
    run(["runs/grouped", "--data.val", "photos/val", "--json", "alone.json", "--workers", "0"], cwd=place, command="calibrate")
    alone = json.loads((place / "alone.json").read_text())
    assert alone["temperature"] == pytest.approx(found["temperature"], rel=1e-6), "the same images"
    assert alone["val"]["change"] != found["val"]["change"], "eight groups, and eighty images"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    job = run(["model", "--data.val", "photos", "--threshold", "f1"], cwd=tmp_path, command="calibrate", code=2)
    assert the_line(job) == "dtl: --threshold is for two classes, and this model has 3: leave it out"
    job = run(["model"], cwd=tmp_path, command="calibrate", code=2)
    assert "give --data.val SRC" in the_line(job)
    facts = json.loads((tmp_path / "model/model.json").read_text())
    calibration = {"temperature": 0.0, "data": "x", "num_samples": 1}
    (tmp_path / "model/model.json").write_text(json.dumps({**facts, "calibration": calibration}))
    job = run(["model", "photos"], cwd=tmp_path, command="predict", code=2)
    assert "temperature" in the_line(job)
