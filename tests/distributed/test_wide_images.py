"""What a network may see of wide images: the class stands at their left edge, which the centre crop cuts off."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from harness import history, run
from PIL import Image
from recipes import write_recipe

LINES = {
    "oblong": "evaluation sees 100 % of the median image (centre crop, 96x32)",
    "crop": "warning: evaluation sees 25 % of the median image (centre crop, 96x32); --data.fit pad sees all of it",
    "stretch": "evaluation sees the whole image, stretched to a square (median image 96x32)",
    "pad": "evaluation sees the whole image, padded to a square (median image 96x32)",
}


def write_wide_images(folder: Path, *, per_class: int) -> None:
    """96x32 pixels of noise; a bright or a dark block in the left fifth is the class."""
    rng = np.random.default_rng(0)
    for name, value in (("bright", 255), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(60, 200, (32, 96, 3)).astype(np.uint8)
            pixels[6:26, 2:16] = value
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_wide_images(folder / "photos/train", per_class=40)
    write_wide_images(folder / "photos/val", per_class=16)
    return folder


@pytest.mark.parametrize("fit", LINES)
def test_training_evaluation_and_prediction_see_the_same(wide: Path, fit: str) -> None:
    size, crop_ratio, kind = ([16, 48], 1.0, "crop") if fit == "oblong" else (32, "auto", fit)
    data = {"train": "photos", "image_size": size, "fit": kind, "crop_ratio": crop_ratio, "global_batch_size": 16, "workers": 1, "augment": {"preset": "none"}}
    recipe = write_recipe(wide, fit, data=data, phases={"all": {"train": "all", "epochs": 6, "lr": 0.05}})
    job = run(["--config", str(recipe)], cwd=wide)
    assert [line for line in job.err().splitlines() if "evaluation sees" in line] == [LINES[fit]]
    top1 = [event["top1"] for event in history(wide / "runs" / fit) if event["event"] == "val"]
    if fit != "crop":
        assert max(top1) == 1.0, "the network sees the block"

    stored = json.loads((wide / f"runs/{fit}/model/model.json").read_text())
    assert stored["preprocessing"]["transform"]["geometry"]["name"] == ("ShortSide" if kind == "crop" else "Fitted")
    run([f"runs/{fit}", "--json", f"{fit}.json", "--workers", "0"], cwd=wide, command="evaluate")
    assert stored["preprocessing"]["image_size"] == size
    assert stored["made_by"]["preprocessing"]["image_size"] == "data.image_size"
    measured = json.loads((wide / f"{fit}.json").read_text())
    assert measured["top1"] == stored["metrics"]["top1"]
    assert measured["loss"] == pytest.approx(stored["metrics"]["loss"], rel=1e-5)

    run([f"runs/{fit}/model", "photos/val", "--out", f"{fit}.csv", "--workers", "0"], cwd=wide, command="predict")
    with open(wide / f"{fit}.csv", newline="") as file:
        right = [Path(row["path"]).parent.name == row["name"] for row in csv.DictReader(file)]
    assert np.mean(right) == stored["metrics"]["top1"]
