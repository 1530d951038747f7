"""A test set is measured once, after the last phase, with the delivered weights: at any world size, through a kill, and each look at it is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness import history, run, status
from page_reader import Page
from recipes import weights_hash, write_images, write_recipe

PHASES: dict[str, Any] = {"head": {"train": "head", "steps": 3, "lr": 0.1}, "all": {"train": "all", "steps": 5, "lr": 0.05, "ema": 0.9}}
ONE = {"all": {"train": "all", "steps": 1, "lr": 0.05}}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three splits of random images, so that nothing can be learned and the losses differ."""
    for seed, (split, count) in enumerate({"train": 20, "val": 10, "test": 13}.items()):
        write_images(tmp_path / "photos" / split, {"a": count, "b": count}, seed=seed)
    return tmp_path / "photos"


def recipe(tmp_path: Path, phases: dict[str, Any], **data: Any) -> list[str]:
    data = {"train": "photos", "global_batch_size": 16, "workers": 0, **data}
    return ["--config", str(write_recipe(tmp_path, phases=phases, data=data, tracking={"report": True, "wandb": "off"}))]


def events_of_test(folder: Path) -> list[dict[str, Any]]:
    return [event for event in history(folder) if event["event"] == "test"]


@pytest.mark.parametrize("world", [1, 2])
def test_once_at_the_end_also_through_a_kill_in_it(tmp_path: Path, photos: Path, world: int) -> None:
    options = recipe(tmp_path, PHASES)
    job = run(options, cwd=tmp_path, world=world)
    folder = tmp_path / "runs/tiny"
    (event,) = events_of_test(folder)
    assert (event["phase"], event["step"], event["num_samples"]) == ("all", 8, 26)
    assert history(folder)[-1] == event  # after all that chooses
    found = status(folder)["test"]
    assert {key: found[key] for key in ("top1", "top5", "loss", "num_samples")} == {key: event[key] for key in ("top1", "top5", "loss", "num_samples")}
    assert found["look"] == 1
    assert json.loads((folder / "model/model.json").read_text())["metrics"]["test"]["loss"] == event["loss"]
    assert "(26 samples; look 1 at this test set by runs in runs/)" in job.err()
    page = Page.read(folder / "report/index.html").text
    assert "top-1 on 26 test images" in page
    assert "measured once, after the last phase; look 1 at this test set by runs in runs/" in page
    # The same weights, by another program: the same numbers, and no other look.
    run([str(folder), "--split", "test", "--json", "test.json"], cwd=tmp_path, command="evaluate")
    again = json.loads((tmp_path / "test.json").read_text())
    assert (again["top1"], again["num_samples"], again["look"]) == (event["top1"], 26, 1)
    assert again["loss"] == pytest.approx(event["loss"], rel=1e-5)

    run([*options, "--run.name", "killed"], cwd=tmp_path, world=world, code=-9, by_rank={rank: {"before": "kill_hooks:in_the_test"} for rank in range(world)})
    killed = tmp_path / "runs/killed"
    assert events_of_test(killed) == []
    assert not (killed / "looks.jsonl").exists()
    run([*options, "--run.name", "killed"], cwd=tmp_path, world=world)
    assert events_of_test(killed) == [event]
    assert weights_hash(killed) == weights_hash(folder)
    assert history(killed) == history(folder)


def test_looks_are_counted_over_runs_and_of_equal_weights_once(tmp_path: Path, photos: Path) -> None:
    options = recipe(tmp_path, ONE)
    run([*options, "--run.name", "first"], cwd=tmp_path)
    run([*options, "--run.name", "second", "--run.seed", "1"], cwd=tmp_path)
    # The same images in another folder, and named by hand.
    (photos / "test").rename(tmp_path / "elsewhere")
    job = run([*options, "--run.name", "third", "--run.seed", "2", "--data.test", "elsewhere"], cwd=tmp_path)
    assert "look 3 at this test set by runs in runs/)" in job.err()
    # Finished: its result again, and no look.
    job = run([*options, "--run.name", "third", "--run.seed", "2", "--data.test", "elsewhere"], cwd=tmp_path)
    assert "look 3 at this test set by runs in runs/)" in job.err()
    assert re.search(r" test\|\n\|.* top1\|\n", job.err()), "the closing table's column, whose title has two lines"
    # Weights that were never measured there, by `--data.val`: a look too.
    run([*options, "--run.name", "other", "--run.seed", "5", "--data.val", "elsewhere"], cwd=tmp_path)
    run(["runs/other", "--json", "other.json"], cwd=tmp_path, command="evaluate")
    assert json.loads((tmp_path / "other.json").read_text())["look"] == 4
    # A run that starts afresh keeps the look of its earlier weights.
    job = run([*options, "--run.name", "third", "--run.seed", "3", "--run.resume", "never", "--data.test", "elsewhere"], cwd=tmp_path)
    assert "look 5 at this test set by runs in runs/)" in job.err()
    run(["runs/first", "runs/second", "runs/third", "--out", "page", "--table-csv", "table.csv"], cwd=tmp_path, command="report")
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert rows[0].endswith(",test_top1")
    assert {float(row.split(",")[-1]) for row in rows[1:]} == {status(tmp_path / "runs" / name)["test"]["top1"] for name in ("first", "second", "third")}
    assert "test top\u20111" in Page.read(tmp_path / "page/index.html").text  # a hyphen at which no line ends


def test_what_chooses_cannot_test(tmp_path: Path, photos: Path) -> None:
    options = recipe(tmp_path, ONE)
    job = run([*options, "--data.test", "photos/val"], cwd=tmp_path, code=2)
    assert "data.test photos/val holds the validation images, which choose the weights" in job.err()
    # The test folder of data.train, named as data.val, is validated on, as the user says: there is no test set then.
    run([*options, "--data.val", "photos/test"], cwd=tmp_path)
    assert events_of_test(tmp_path / "runs/tiny") == []
    assert "test" not in status(tmp_path / "runs/tiny")


def test_a_test_folder_alone_never_validates_and_a_run_that_did_is_told_how_to_resume(tmp_path: Path) -> None:
    for seed, (split, count) in enumerate({"train": 60, "test": 6}.items()):
        write_images(tmp_path / "photos" / split, {"a": count, "b": count}, seed=seed)
    options = recipe(tmp_path, ONE)
    job = run(options, cwd=tmp_path, world=2)
    line = "20 of 120 training images (16.7%, stratified) are used as validation images, because there are test images and no validation images"
    assert job.err().count(line) == 1
    folder = tmp_path / "runs/tiny"
    (event,) = events_of_test(folder)
    assert event["num_samples"] == 12
    assert [one["num_samples"] for one in history(folder) if one["event"] == "val"] == [20]
    for split, count in (("val", 20), ("test", 12)):
        run([str(folder), "--split", split, "--json", "found.json"], cwd=tmp_path, command="evaluate")
        assert json.loads((tmp_path / "found.json").read_text())["num_samples"] == count
    # As a dtl did that validated on the test images.
    old = [*options, "--run.name", "old", "--phases.all.steps", "3"]
    run([*old, "--data.val", "photos"], cwd=tmp_path)
    assert events_of_test(tmp_path / "runs/old") == []
    more = [*options, "--run.name", "old", "--phases.all.steps", "5"]
    job = run(more, cwd=tmp_path, code=2)
    assert "old was started by a dtl that validated on the test images of data.train: to resume it, name them as data.val (--data.val photos)" in job.err()
    run([*more, "--data.val", "photos"], cwd=tmp_path)
    assert status(tmp_path / "runs/old")["step"] == 5
    job = run(["runs/old", "--split", "test"], cwd=tmp_path, code=2, command="evaluate")
    assert "has no test set" in job.err()
