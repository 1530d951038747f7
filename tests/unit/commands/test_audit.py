"""`dtl audit`: what is planted is found, on one process and on two, with and without a network; what is set is honoured by the next run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from harness import run, the_line
from page_reader import Page
from PIL import Image, ImageOps
from recipes import write_recipe

LEVELS = {"dark": 60, "mid": 125, "bright": 190}


def picture(level: int, seed: int) -> Image.Image:
    """Shapes around a level, and details."""
    draw = np.random.default_rng(seed)
    pixels = np.full((96, 96, 3), float(level))
    for size, strength in ((4, 22), (12, 14), (32, 9)):
        coarse = Image.fromarray(draw.uniform(0, 255, (size, size)).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        pixels += (np.asarray(coarse, float)[..., None] - 127) / 127 * strength
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with a run on them, and in them: a recompressed and mirrored leak, a crop, one image under two labels, two wrong labels."""
    folder = tmp_path_factory.mktemp("audit")
    for part, (split, count) in enumerate({"train": 16, "val": 6}.items()):
        for number, (name, level) in enumerate(LEVELS.items()):
            (folder / "photos" / split / name).mkdir(parents=True)
            for image in range(count):
                picture(level, 1000 * part + 100 * number + image).save(folder / "photos" / split / name / f"{image:02d}.png")
    photos = folder / "photos"
    ImageOps.mirror(Image.open(photos / "train/dark/00.png")).save(photos / "val/dark/leak.jpg", quality=60)
    Image.open(photos / "train/mid/01.png").crop((2, 3, 93, 94)).save(photos / "train/mid/crop.png")
    Image.open(photos / "train/mid/02.png").save(photos / "train/bright/other.jpg", quality=90)
    for source, wrong in (("bright/05", "dark/wrong"), ("dark/07", "bright/wrong")):
        (photos / f"train/{source}.png").rename(photos / f"train/{wrong}.png")
    phases = {"all": {"train": "all", "steps": 2, "lr": 0.001}}
    run(["--config", str(write_recipe(folder, phases=phases, data={"train": "photos", "global_batch_size": 24}))], cwd=folder)
    return folder


def rows(place: Path, out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((place / out / "audit.csv").read_text())))


def twins(found: list[dict[str, str]]) -> set[tuple[str, str, str, str]]:
    return {(row["kind"], row["path"], row["other"], row["suggestion"]) for row in found if row["kind"] != "label" and row["kind"] != "same scene"}


PLANTED = {
    ("same photo", "train/dark/00.png", "val/dark/leak.jpg", "drop"),
    ("same photo", "train/mid/crop.png", "train/mid/01.png", "drop"),
}


def test_planted_twins_are_found_by_pixels_on_any_number_of_processes(place: Path) -> None:
    job = run(["photos", "--fail-on", "leaks"], cwd=place, command="audit", code=1)
    found = rows(place, "audit")
    assert twins(found) - {row for row in twins(found) if row[0] == "two labels"} == PLANTED
    assert [sorted((row["path"], row["other"])) for row in found if row["kind"] == "two labels"] == [["train/bright/other.jpg", "train/mid/02.png"]]
    assert all(row["action"] == "" for row in found)
    assert "twins: the same photo: 2, of them 1 in two splits" in job.out()
    page = Page.read(place / "audit/index.html")
    page.check_self_contained()
    assert len(page.images) == 6
    assert "train/mid/crop.png" in page.text
    run(["photos", "--out", "two"], cwd=place, command="audit", world=2)
    assert (place / "two/audit.csv").read_text() == (place / "audit/audit.csv").read_text()


def test_a_run_audits_its_own_images_and_trains_on_what_is_decided(place: Path) -> None:
    job = run(["runs/tiny", "--out", "own", "--threshold", "0.99999"], cwd=place, command="audit")
    found = rows(place, "own")
    assert twins(found) >= PLANTED
    wrong = {row["path"]: row["suggestion"] for row in found if row["kind"] == "label"}
    assert wrong.get("train/dark/wrong.png") == "relabel:bright", job.out()
    assert len(wrong) <= 5
    again = run(["runs/tiny", "--out", "own", "--threshold", "0.99999"], cwd=place, command="audit", world=2)
    assert "cached features are read from" in again.err()
    assert rows(place, "own") == found
    for row in found:
        row["action"] = row["suggestion"] if row["path"] in ("train/dark/wrong.png", "train/mid/crop.png") else "keep"
    with (place / "decided.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    job = run(["--config", "tiny.yaml", "--data.audit", "decided.csv", "--run.name", "clean"], cwd=place)
    assert "data.audit decided.csv: 1 dropped (train 1); 1 relabelled (train 1)" in job.err() + job.out()
    assert len((place / "runs/clean/audited.jsonl").read_text().splitlines()) == 2


def test_what_cannot_be_audited_is_refused_in_one_line(place: Path) -> None:
    (place / "single/dark").mkdir(parents=True)
    picture(60, 1).save(place / "single/dark/1.png")
    torch.save({"other.weight": torch.zeros(3, 3)}, place / "other.pt")
    for arguments, message in {
        ("nowhere",): "nowhere",
        ("single",): "single has only one class, 'dark'; a classifier needs two or more, and more than its one image",
        ("photos", "--model", "networks:small", "--weights", "other.pt"): "transfer from other.pt refused: nothing matches",
        ("photos", "--model", "networks:small"): "--model names the network, and --weights its weights: give both",
        ("photos", "--out", "tiny.yaml"): "--out .*tiny.yaml is a file; give a folder",
        ("runs/tiny", "--data.image_size", "32"): "runs/tiny is a run, whose own network and settings are used: leave out --data.image_size",
    }.items():
        assert message.split(".*")[-1] in the_line(run(list(arguments), cwd=place, command="audit", code=2))


def test_of_fewer_images_than_folds_no_label_is_judged_and_a_line_says_why(place: Path) -> None:
    for number, name in enumerate(("dark", "mid")):
        (place / "few" / name).mkdir(parents=True)
        for image in range(2):
            picture(60 + 70 * number, 50 * number + image).save(place / f"few/{name}/{image}.png")
    torch.save(networks.small(2).state_dict(), place / "small.pt")
    job = run(["few", "--model", "networks:small", "--weights", "small.pt", "--threshold", "0.99999", "--out", "of-few"], cwd=place, command="audit")
    assert "labels are not judged: 5 folds of two classes need 5 images that are no twins; there are 4 of 2" in job.out()
    assert rows(place, "of-few") == []
