"""`dtl folds`: every image is predicted once, by the run that did not see it; sums of folds equal one pass, in any order of folds and after a kill."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import run, status, the_line
from page_reader import Page
from recipes import weights_hash, write_images, write_recipe

from dtl.cli import main
from dtl.config.own import stored_config

PHASES = {"all": {"train": "all", "steps": 6, "lr": 0.05}}
DATA = {"train": "photos", "global_batch_size": 12, "augment": {"preset": "cifar"}, "workers": 0, "val_fraction": 0.2}
FOLDS = ["--config", "tiny.yaml", "--folds", "3"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny-folds, trained in one go."""
    folder = tmp_path_factory.mktemp("folds")
    write_images(folder / "photos", {"a": 13, "b": 11, "c": 9})
    write_recipe(folder, phases=PHASES, data=DATA, checkpoint={"every_steps": 2})
    job = run(FOLDS, cwd=folder, command="folds")
    assert "over 3 folds: top1" in job.out()
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/tiny-folds/results.json").read_text())  # type: ignore[no-any-return]


def test_every_image_is_predicted_once_and_sums_are_exact(reference: Path) -> None:
    values = results(reference)
    rows = list(csv.DictReader((reference / "runs/tiny-folds/predictions.csv").read_text().splitlines()))
    assert sorted(row["path"] for row in rows) == sorted(str(file.relative_to(reference / "photos")) for file in (reference / "photos").rglob("*.jpg"))
    assert list(rows[0]) == ["path", "label", "prediction", "probability", "loss", "fold"]
    # One pass over all images, and over those of each fold.
    for one, mine in [(values, rows), *((fold, [row for row in rows if row["fold"] == str(fold["fold"])]) for fold in values["per_fold"])]:
        right = sum(row["label"] == row["prediction"] for row in mine)
        assert (one["num_samples"], one["correct"], one["top1"]) == (len(mine), right, right / len(mine))
        assert one["loss"] == math.fsum(float(row["loss"]) for row in mine) / len(mine)
    counts = [[sum((row["label"], row["prediction"]) == (label, guess) for row in rows) for guess in "abc"] for label in "abc"]
    assert values["confusion"] == counts
    tops = [fold["top1"] for fold in values["per_fold"]]
    assert values["mean"]["top1"] == math.fsum(tops) / 3
    assert values["range"]["top1"] == [min(tops), max(tops)]
    assert values["top1_interval"][0] < values["top1"] < values["top1_interval"][1]
    assert sum(row["support"] for row in values["per_class"]) == 33


def test_a_fold_is_an_ordinary_run(reference: Path) -> None:
    for fold in results(reference)["per_fold"]:
        place = reference / f"runs/tiny-folds/fold-{fold['fold']}"
        found = status(place)
        assert found["state"] == "done"
        assert (found["test"]["num_samples"], found["test"]["top1"], found["test"]["look"]) == (fold["num_samples"], fold["top1"], 1)
    job = run(["runs/tiny-folds/fold-2", "--split", "test", "--json", "-"], cwd=reference, command="evaluate")
    assert json.loads(job.out())["top1"] == results(reference)["per_fold"][1]["top1"]
    val = json.loads(run(["runs/tiny-folds/fold-2", "--json", "-"], cwd=reference, command="evaluate").out())
    kept = json.loads((reference / "runs/tiny-folds/fold-2/model/model.json").read_text())["metrics"]
    assert (val["num_samples"], val["top1"]) == (kept["num_samples"], kept["top1"])


def test_the_page(reference: Path) -> None:
    page = Page.read(reference / "runs/tiny-folds/report/index.html")
    page.check_self_contained()
    assert "each image predicted by the run without it" in page.text
    assert "The last line counts all images together" in page.text
    run(["runs/tiny-folds/fold-2"], cwd=reference, command="report")
    fold = Page.read(reference / "runs/tiny-folds/fold-2/report/index.html")
    assert fold.text.count("tiny-folds/fold-2") >= 1, "every recipe has a fold-2"
    assert "2 of 3: its images are the test set" in fold.text


def test_another_order_and_a_kill_give_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "photos", tmp_path / "photos")
    shutil.copy(reference / "tiny.yaml", tmp_path)
    job = run([*FOLDS, "--fold", "3"], cwd=tmp_path, command="folds")
    assert "folds left: 1, 2" in job.err()
    run(FOLDS, cwd=tmp_path, command="folds", code=-9, by_rank={0: {"before": "kill_hooks:in_the_second_fold"}})
    assert not (tmp_path / "runs/tiny-folds/results.json").exists()
    begun = {number: (tmp_path / f"runs/tiny-folds/fold-{number}/model/model.json").exists() for number in (1, 2, 3)}
    assert begun == {1: True, 2: False, 3: True}
    job = run(FOLDS, cwd=tmp_path, command="folds")
    assert "resuming at step" in job.err()
    assert job.err().count("run runs/tiny-folds/fold-") == 1, "what is done is not trained again"
    for number in (1, 2, 3):
        mine, other = (folder / f"runs/tiny-folds/fold-{number}" for folder in (tmp_path, reference))
        assert weights_hash(mine) == weights_hash(other)
    for name in ("results.json", "predictions.csv", "folds.json"):
        assert (tmp_path / "runs/tiny-folds" / name).read_bytes() == (reference / "runs/tiny-folds" / name).read_bytes()


def test_what_was_begun_otherwise_is_refused_by_name(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reference)
    monkeypatch.setenv("DTL_CACHE", str(reference / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    before = (reference / "runs/tiny-folds/folds.json").read_bytes()
    write_images(tmp_path / "others", {"a": 4, "b": 4, "c": 4}, seed=1)
    for options, line in [
        (["--folds", "4"], "was begun with --folds 3, now it is 4; give the same again, or begin other folds with --run.name NEW"),
        (["--data.fold.seed", "1"], "was begun with data.fold.seed 0, now it is 1"),
        (["--data.train", str(tmp_path / "others")], r"was begun with other images (33, now 12): data.train has changed"),
        (["--phases.all.lr", "0.1"], "fold-1 was trained with phases.all.lr 0.05, now it is 0.1: all folds need the same settings"),
        (["--run.seed", "1"], "fold-1 was trained with run.seed 0, now it is 1"),
        (
            ["--folds", "12", "--run.name", "many"],
            "12 folds need images of each class in each of them, but class 'b' has 11 different images: at most 11 folds",
        ),
        (["--folds", "10", "--run.name", "many"], "class 'c' has 9 different images: at most 9 folds (--folds 9)"),
        (["--fold", "1", "--refit"], "--fold trains one fold, and --refit needs all of them"),
        (["--fold", "4"], "--fold 4: there are 3 folds (--folds)"),
        (["--run.resume", "never"], "run.resume never is for one run"),
        (["--run.debug", "true"], "run.debug is for one run: dtl train --run.debug true"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: the folder"),
    ]:
        assert main(["folds", *FOLDS, *options]) == 2
        said = capfd.readouterr().err
        assert line in said
        assert said.count("dtl: ") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["folds", *FOLDS]) == 2
    assert "several processes train one run at a time: --fold N, or --refit when all are done" in capfd.readouterr().err
    assert main(["folds", *FOLDS, "--run.name", "many", "--refit"]) == 2
    assert "--refit on several processes is the last: train fold 1 before it (--fold 1)" in capfd.readouterr().err
    shutil.rmtree(reference / "runs/many-folds")
    assert (reference / "runs/tiny-folds/folds.json").read_bytes() == before
    assert not (reference / "runs/many-folds").exists()


def test_a_folder_of_something_else_is_refused(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "photos", tmp_path / "photos")
    shutil.copy(reference / "tiny.yaml", tmp_path)
    (tmp_path / "runs/tiny-folds").mkdir(parents=True)
    (tmp_path / "runs/tiny-folds/thesis.txt").write_text("mine")
    assert "tiny-folds is not empty (it holds 'thesis.txt'), and no folds are in it" in the_line(run(FOLDS, cwd=tmp_path, command="folds", code=2))


def test_refit_is_the_last(reference: Path) -> None:
    """The last test: it adds to the folder of the others."""
    before = results(reference)
    job = run([*FOLDS, "--refit", "--json", "all.json"], cwd=reference, command="folds")
    assert "run runs/tiny-folds/refit: 26 training and 7 validation images" in job.err(), "no image is held out as a test"
    low, high = (f"{100 * value:.1f}" for value in before["top1_interval"])
    assert (
        f"refit is trained on all images; its expected top1 is that of the folds, {100 * before['top1']:.2f} % (95 % interval {low} to {high} %)" in job.out()
    )
    assert {**results(reference), "refit": None} == before
    assert json.loads((reference / "all.json").read_text())["refit"] == "runs/tiny-folds/refit"
    assert "test" not in status(reference / "runs/tiny-folds/refit")
    again = run([*FOLDS, "--refit", "--json", "-"], cwd=reference, command="folds")
    assert "runs/tiny-folds/refit is done" in again.err()
    assert json.loads(again.out()) == results(reference)


def test_another_process_may_begin_them_at_the_same_moment(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "photos", tmp_path / "photos")
    shutil.copy(reference / "tiny.yaml", tmp_path)
    (tmp_path / "meanwhile").mkdir()
    shutil.copy(reference / "runs/tiny-folds/folds.json", tmp_path / "meanwhile")
    (tmp_path / "runs/tiny-folds").mkdir(parents=True)
    run([*FOLDS, "--fold", "1"], cwd=tmp_path, command="folds", by_rank={0: {"before": "obstacles:begun_by_another"}})
    assert status(tmp_path / "runs/tiny-folds/fold-1")["state"] == "done"


def test_the_batch_size_that_the_images_give_is_the_runs_own(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "photos", tmp_path / "photos")
    shutil.copy(reference / "tiny.yaml", tmp_path)
    auto = [*FOLDS, "--data.global_batch_size", "auto"]
    run([*auto, "--fold", "1"], cwd=tmp_path, command="folds")
    said = run(auto, cwd=tmp_path, command="folds").err()
    assert "fold-1" not in said, "it is done"
    assert said.count("data.global_batch_size auto: 16, which is 1 step an epoch") == 2
    assert {stored_config(tmp_path / f"runs/tiny-folds/fold-{number}").config.data.global_batch_size for number in (1, 2, 3)} == {16}
    line = the_line(run([*FOLDS, "--data.global_batch_size", "20"], cwd=tmp_path, command="folds", code=2))
    assert "fold-1 was trained with data.global_batch_size 16, now it is 20: all folds need the same settings" in line
