"""Images of 12 bits, half of them stored upside down: what training sees, evaluation, prediction and export see too."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from harness import history, run
from PIL import Image
from recipes import write_recipe


def write_images(folder: Path, *, per_class: int, seed: int) -> None:
    """PNG of 16 bits with values up to 4095; a bright block at the left or the right edge is the class, once the image stands as its EXIF says."""
    rng = np.random.default_rng(seed)
    for name, place in (("left", slice(2, 12)), ("right", slice(20, 30))):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            values = rng.integers(0, 1500, (32, 32)).astype(np.uint16)
            values[6:26, place] = rng.integers(3000, 4096, (20, 10))
            exif = Image.Exif()
            if number % 2:
                values, exif[0x0112] = np.ascontiguousarray(values[::-1, ::-1]), 3
            data = io.BytesIO()
            Image.fromarray(values).save(data, "PNG", exif=exif)
            (folder / name / f"{number}.png").write_bytes(data.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what the run has printed."""
    folder = tmp_path_factory.mktemp("twelve")
    write_images(folder / "photos/train", per_class=24, seed=0)
    write_images(folder / "photos/val", per_class=10, seed=1)
    data = {"train": "photos", "image_size": 32, "fit": "stretch", "global_batch_size": 16, "workers": 0, "augment": {"preset": "none"}}
    recipe = write_recipe(folder, "twelve", data=data, phases={"all": {"train": "all", "epochs": 6, "lr": 0.05}})
    return folder, run(["--config", str(recipe)], cwd=folder).err()


def test_training_sees_them_and_says_the_range(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert max(event["top1"] for event in history(folder / "runs/twelve") if event["event"] == "val") == 1.0
    assert "values of more than 8 bits: 0 becomes 0, 4095 becomes 255 (data.range auto: the training images' values)" in printed
    stored = json.loads((folder / "runs/twelve/model/model.json").read_text())
    assert stored["preprocessing"]["pixels"] == {"range": [0.0, 4095.0], "exif": True, "alpha": True}


def test_evaluation_and_prediction_see_the_same(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    stored = json.loads((folder / "runs/twelve/model/model.json").read_text())
    run(["runs/twelve", "--json", "seen.json", "--workers", "0"], cwd=folder, command="evaluate")
    measured = json.loads((folder / "seen.json").read_text())
    assert measured["top1"] == 1.0
    assert measured["loss"] == pytest.approx(stored["metrics"]["loss"], rel=1e-5)
    run(["runs/twelve", "photos/val", "--out", "p.csv", "--workers", "0"], cwd=folder, command="predict")
    with (folder / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert all(f"/{row['label']}/" in row["path"] for row in rows)


def test_a_model_folder_without_the_mark_refuses_what_it_saw_as_white(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    path = folder / "runs/twelve/model/model.json"
    text = path.read_text()
    facts = json.loads(text)
    del facts["preprocessing"]["pixels"]
    try:
        path.write_text(json.dumps(facts))
        job = run(["runs/twelve/model", "photos/val/left/0.png", "--out", "q.csv", "--workers", "0", "--trust"], cwd=folder, command="predict", code=2)
    finally:
        path.write_text(text)
    assert "its values have more than 8 bits (mode I;16), and there is no range for them" in job.err()
