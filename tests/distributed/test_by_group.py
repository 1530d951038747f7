"""`--by-group`: one answer per patient or product, by the mean of its images' probabilities, the same at any number of processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from harness import run, status
from page_reader import Page
from recipes import write_recipe
from tiny_images import encoded

import dtl
from dtl.intervals import shown, wilson

REGEX = "/(p[0-9]+)_"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 24 patients with five images each, all of one class."""
    place = tmp_path_factory.mktemp("groups")
    for number in range(120):
        patient = number // 5
        file = place / "photos" / "ab"[patient % 2] / f"p{patient:02d}_{number % 5}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(height=16, width=16, seed=number))
    data = {"train": "photos", "val_fraction": 0.25, "workers": 0, "global_batch_size": 16, "group": {"regex": REGEX}}
    recipe = write_recipe(place, phases={"all": {"train": "all", "steps": 4, "lr": 0.05}}, data=data)
    job = run(["--config", str(recipe)], cwd=place)
    assert "30 of 120 training images (25.0%, 6 of 24 groups, 25.0% to 25.0% of a class) are used as validation images" in job.err()
    return place


@pytest.mark.parametrize("flip", [False, True])
def test_evaluate(folder: Path, flip: bool) -> None:
    more = ["--flip"] if flip else []
    found = []
    for world in (1, 2):
        job = run(["runs/tiny", "--by-group", *more, "--json", f"{world}.json", "--csv", "all.csv"], cwd=folder, command="evaluate", world=world)
        found.append(json.loads((folder / f"{world}.json").read_text()))
        assert "6 groups, by mean probabilities: top1 " in job.out()
    assert found[0]["by_group"] == found[1]["by_group"]
    assert (found[0]["num_samples"], found[0]["by_group"]["num_groups"]) == (30, 6)
    with open(folder / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right: dict[str, list[float]] = {}
    for row in rows:  # of two classes, the probability of the label follows from the loss
        right.setdefault(row["path"][2:5], []).append(np.exp(-float(row["loss"])))
    means = np.array([np.mean(several) for several in right.values()])
    assert found[0]["by_group"]["top1"] == (means > 0.5).mean()
    assert found[0]["by_group"]["loss"] == pytest.approx(-np.log(means).mean(), rel=1e-5)
    assert sum(map(sum, found[0]["by_group"]["confusion"])) == 6


def test_a_runs_own_intervals_draw_whole_groups(folder: Path) -> None:
    """As those of `dtl evaluate`, in the closing table, on the page and in its files."""
    more = ["--data.test-fraction", "0.25", "--run.name", "tested", "--tracking.report", "true"]
    job = run(["--config", "tiny.yaml", *more], cwd=folder, world=2)
    measured = {}
    for split in ("val", "test"):
        run(["runs/tested", "--split", split, "--json", "measured.json"], cwd=folder, command="evaluate")
        measured[split] = json.loads((folder / "measured.json").read_text())
    row, test = status(folder / "runs/tested")["phases"][-1], status(folder / "runs/tested")["test"]
    text, page = " ".join(job.err().split()), Page.read(folder / "runs/tested/report/index.html").text
    for split, found, top1 in (("val", row["top1_interval"], row["val"]["top1"]), ("test", test["top1_interval"], test["top1"])):
        assert measured[split]["top1"] == top1
        assert found == measured[split]["top1_interval"]
        assert tuple(found) != wilson(top1, 30)
        assert shown(tuple(found)).replace(" to ", "-" if split == "val" else " to ") in text
        assert shown(tuple(found)) in page.replace("\u00a0", " ")
    assert json.loads((folder / "runs/tested/model/model.json").read_text())["metrics"]["top1_interval"] == row["top1_interval"]


def test_predict_and_the_mean_over_both_views(folder: Path) -> None:
    outputs = []
    for world in (1, 2):
        run(
            ["runs/tiny", "photos", "--by-group", "--flip", "--top", "2", "--out", f"{world}.jsonl", "--batch-size", "7"],
            cwd=folder,
            command="predict",
            world=world,
        )
        outputs.append((folder / f"{world}.jsonl").read_text())
    assert outputs[0] == outputs[1]
    groups = [json.loads(line) for line in outputs[0].splitlines()]
    assert len(groups) == 24
    assert {one["path"] for one in groups} == {f"p{number:02d}" for number in range(24)}
    one = next(one for one in groups if one["path"] == "p03")
    from PIL import Image, ImageOps

    probabilities = []
    for file in sorted((folder / "photos").rglob("p03_*.jpg")):
        image = Image.open(file).convert("RGB")
        for view in (image, ImageOps.mirror(image)):
            (answer,) = dtl.predict(folder / "runs/tiny", [view], top=2)
            probabilities.append({each["label"]: each["probability"] for each in answer["predictions"]})
    for each in one["predictions"]:
        assert each["probability"] == pytest.approx(np.mean([found[each["label"]] for found in probabilities]), abs=0.02)


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DTL_CACHE", str(folder / "cache"))
    found = dtl.evaluate("runs/tiny", by_group=True, workers=0)
    assert (found["num_samples"], found["by_group"]["num_groups"]) == (30, 6)
    assert dtl.evaluate("runs/tiny", flip=True, workers=0)["loss"] != found["loss"]


def test_what_is_refused(folder: Path) -> None:
    job = run(["runs/tiny", "--group-regex", "_([0-9])"], cwd=folder, command="evaluate", code=2)
    assert "with images of more than one class, so that there is no one right answer: '" in job.err()
    job = run(["runs/tiny/model", "photos", "--by-group"], cwd=folder, command="predict", code=2)
    assert "--by-group: which images belong together is not known; give --group-regex R, or train with data.group.regex" in job.err()
    job = run(["runs/tiny", "photos", "--group-regex", "(x)"], cwd=folder, command="predict", code=2)
    assert "--by-group: '(x)' does not match " in job.err()
