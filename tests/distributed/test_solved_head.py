"""A phase whose head is solved: one step, the same bits at any world size, done anew after a kill in it, and what it cannot be beside."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import history, run, start, status, the_line
from recipes import weights_hash, write_images, write_recipe

SOLVED = {"train": "head", "optimizer": "solve"}


def recipe(folder: Path, name: str, phases: dict[str, Any] | None = None, **sections: Any) -> list[str]:
    """Images are augmented at random: the head is solved on clean ones all the same."""
    data = {"train": str(folder / "images"), "val_fraction": 0.2}
    file = write_recipe(folder, name, data=data, phases={"head": SOLVED} if phases is None else phases, **sections)
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solved")
    write_images(folder / "images", {"a": 40, "b": 30, "c": 20})
    run(recipe(folder, "one"), cwd=folder)
    return folder


def test_it_is_one_step_with_an_event_of_its_own(solved: Path) -> None:
    events = history(solved / "runs/one")
    assert [(event["event"], event["step"]) for event in events] == [("solve", 1), ("val", 1)]
    found = events[0]
    assert found["converged"]
    assert found["folds"] == 5
    assert [found["strength"], min(loss for _, loss in found["path"])] in found["path"]
    done = status(solved / "runs/one")
    assert (done["state"], done["step"]) == ("done", 1)
    assert done["phases"][0]["train_loss"] == found["loss"]
    out = run(["runs/one", "--json", "metrics.json"], cwd=solved, command="evaluate")
    metrics = json.loads((solved / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(events[1]["top1"], abs=1e-9), out.err()
    assert metrics["loss"] == pytest.approx(events[1]["loss"], rel=1e-4)
    again = run([*recipe(solved, "one"), "--tracking.report", "true"], cwd=solved).err()
    assert "runs/one is finished (step 1); its head is solved, which no more steps improve" in again
    assert "next         train the whole network (--config finetune), or take another one (--model.name), each with --run.name NEW" in again
    run(["runs/one"], cwd=solved, command="report")
    page = (solved / "runs/one/report/index.html").read_text()
    assert "Phases" in page
    assert "Training curves" not in page


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_weights(solved: Path, world: int) -> None:
    job = run(recipe(solved, f"of-{world}"), cwd=solved, world=world)
    assert "cached features are read from" in job.err(0)
    assert job.err(1).count("solved in") == 0
    assert weights_hash(solved / f"runs/of-{world}") == weights_hash(solved / "runs/one")
    assert history(solved / f"runs/of-{world}")[0] == history(solved / "runs/one")[0]


def test_a_kill_inside_repeats_it(solved: Path) -> None:
    phases = {"before": {"train": "all", "steps": 3}, "head": SOLVED, "after": {"train": "all", "steps": 2}}
    arguments = recipe(solved, "killed", phases)
    job = start(arguments, cwd=solved, by_rank={0: {"before": "recipes:dies_solving"}}).wait()
    assert job.codes == [-signal.SIGKILL]
    assert [event["step"] for event in history(solved / "runs/killed") if event["event"] == "solve"] == []
    run(arguments, cwd=solved)
    run(recipe(solved, "whole", phases), cwd=solved)
    assert weights_hash(solved / "runs/killed") == weights_hash(solved / "runs/whole")
    events = history(solved / "runs/killed")
    assert events == history(solved / "runs/whole")
    assert [event["step"] for event in events if event["event"] == "solve"] == [4]
    assert status(solved / "runs/killed")["step"] == 6


def test_an_option_of_sgd_trains_by_sgd_in_one_line(solved: Path) -> None:
    job = run([*recipe(solved, "sgd"), "--phases.head.lr", "0.5", "--phases.head.steps", "4"], cwd=solved)
    line = "phase head: --phases.head.lr, --phases.head.steps mean optimizer sgd in place of solve: 4 steps, lr 0.5"
    assert job.err().splitlines().count(line) == 1
    assert {event["event"] for event in history(solved / "runs/sgd")} == {"train", "epoch", "val"}


def test_what_cannot_be_solved_is_refused_with_what_trains_it(solved: Path) -> None:
    job = run([*recipe(solved, "convolution"), "--model.name", "torchvision/squeezenet1_1", "--data.image_size", "32"], cwd=solved, code=2)
    assert the_line(job) == (
        "dtl: phases.head.optimizer is solve, but the head classifier.1 is no linear layer with a bias; "
        "train it: --phases.head.optimizer sgd --phases.head.epochs 10"
    )
    job = run([*recipe(solved, "backbone"), "--phases.head.train", "last:2"], cwd=solved, code=2)
    assert the_line(job).startswith("dtl: phase head: optimizer solve trains the head alone, but `train` has ")
    dry = run([*recipe(solved, "dry"), "--dry-run"], cwd=solved)
    assert "solved in one step" in dry.err() + dry.out()
