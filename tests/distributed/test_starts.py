"""The start of a run: what fails before the first step leaves only the reason, and what may not go unsaid is one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from harness import history, kind, run, status
from recipes import weights_hash, write_images, write_recipe

from dtl.errors import UserError
from dtl.inference.model import find_model

SHORT = {"phases": {"head": {"train": "head", "steps": 2, "lr": 0.1}, "all": {"train": "all", "steps": 3, "lr": 0.05, "eval_every": 0.01}}}


@pytest.mark.parametrize("world", [1, 2])
def test_a_start_that_fails_leaves_the_reason_only_and_can_be_mended(tmp_path: Path, world: int) -> None:
    """Wandb is not opened, and the mended command is a first start like any other."""
    recipe = write_recipe(tmp_path, **SHORT, tracking={"wandb": "offline"})
    folder = tmp_path / "runs/tiny"
    torch.save({"a.weight": torch.ones(3, 3)}, tmp_path / "other.pt")
    mistakes = {
        "nowhere": ["--data.train", "nowhere", "--data.val", "nowhere"],
        "no pretrained weights at othr.pt; did you mean 'other.pt'?": ["--transfer.source", "othr.pt"],
        "other.pt": ["--transfer.source", "other.pt"],
        "phase all: train: the pattern 'layr4.*'": ["--phases.all.train", "[layr4.*]"],
    }
    left = ["lock", "status.json"]
    for words, arguments in mistakes.items() if world == 1 else [*mistakes.items()][2:]:
        job = run(["--config", str(recipe), *arguments], cwd=tmp_path, world=world, code=2, env={"WANDB_MODE": "offline"}, packed=False)
        assert words in job.err()
        assert ("packing" in job.err()) == (words == "other.pt"), "names are looked at first"
        assert "wandb" not in job.err()
        if words == "other.pt":
            left.append("transfer_refused.json")
        assert sorted(os.listdir(folder)) == left
        assert status(folder)["state"] == "failed"
        assert words in status(folder)["why"]
    with pytest.raises(UserError, match=r"its start failed before the first step \(input: phase all: train: "):
        find_model(folder)
    job = run(["--config", str(recipe), "--data.image-size", "12", "--tracking.wandb", "off"], cwd=tmp_path, world=world)
    assert "without a new checkpoint" not in job.err()
    assert status(folder)["state"] == "done"
    assert not (folder / "transfer_refused.json").exists()


def test_a_mistake_costs_a_finished_run_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SHORT)
    folder = tmp_path / "runs/tiny"
    run(["--config", str(recipe)], cwd=tmp_path)
    first, before = weights_hash(folder), status(folder)
    for more in ([], ["--run.resume", "never"]):
        run(["--config", str(recipe), "--data.train", "nowhere", "--data.val", "nowhere", *more], cwd=tmp_path, code=2)
        now = status(folder)
        assert (now["state"], now["step"], now["phases"]) == ("failed", 5, before["phases"])
        assert weights_hash(folder) == first
        assert (folder / "checkpoints").is_dir()
    again = run(["--config", str(recipe)], cwd=tmp_path).err()
    assert "is finished (step 5)" in again
    assert "model        runs/tiny/model (model.safetensors, model.json)" in again
    assert "report" not in again, "this recipe makes none"
    assert status(folder)["state"] == "done"


def test_a_finished_run_with_other_weights_is_not_shown_as_if_whole(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SHORT)
    run(["--config", str(recipe)], cwd=tmp_path)
    path = tmp_path / "runs/tiny/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = run(["--config", str(recipe)], cwd=tmp_path, code=2).err()
    assert "model.safetensors do not match the model.json beside them" in again
    data[-1] ^= 1
    path.write_bytes(data)
    assert "is finished (step 5)" in run(["--config", str(recipe)], cwd=tmp_path).err()
    assert status(tmp_path / "runs/tiny")["state"] == "done"


def test_what_may_not_go_unsaid_is_said_once_at_the_start(tmp_path: Path) -> None:
    """A class that only one split has, and threads that a launcher's default leaves idle."""
    write_images(tmp_path / "train", {"ants": 6, "bees": 6, "cows": 1})
    write_images(tmp_path / "val", {"ants": 3, "bees": 1})
    recipe = write_recipe(tmp_path, phases={"all": {"epochs": 1}}, data={"global_batch_size": 13, "train": "train", "val": "val"})
    job = run(["--config", str(recipe)], cwd=tmp_path, world=2, by_rank={1: {"before": "obstacles:other_host"}})
    lines = job.err(rank=0).splitlines()
    assert lines.count("1 of 3 classes without a validation image (left out of top1): cows") == 1
    assert any(line.startswith("phase all: classify, 1 epoch of 1 step, ") for line in lines)
    assert any(f"13 training and 4 validation images of 3 classes, networks:small, 2 processes on {kind()}" in line for line in lines)
    spare = [line for line in lines if "--num_cpu_threads_per_process" in line]
    assert [line.partition(",")[0] for line in spare] == ["each process computes with 1 thread"] * (kind() == "cpu" and len(os.sched_getaffinity(0)) > 1)

    shutil.rmtree(tmp_path / "train/cows")
    write_images(tmp_path / "train", {f"class{i}": 1 for i in range(6)}, seed=9)
    split = ["--data.val", "null", "--data.val-fraction", "0.1", "--run.name", "split"]
    assert "6 of 8 classes without a validation image" in (said := run(["--config", str(recipe), *split], cwd=tmp_path).err())
    assert ": class0, class1, class2, class3, class4 and 1 more" in said


def test_the_closing_row_is_of_the_weights_that_the_phase_hands_on(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, phases={keep: {"steps": 4, "lr": 0.2, "eval_every": 0.01, "keep": keep} for keep in ("best", "last")}, tracking={"log_every": 1}
    )
    run(["--config", str(recipe)], cwd=tmp_path)
    folder = tmp_path / "runs/tiny"
    events = history(folder)
    for row in status(folder)["phases"]:
        told = [event for event in events if event["event"] == "val" and event["phase"] == row["phase"]]
        wanted = told[-1] if row["phase"] == "last" else min(told, key=lambda event: (-event["top1"], event["loss"]))
        (trained,) = [event for event in events if event["event"] == "epoch" and event["step"] == wanted["step"]]
        assert (row["kept_step"], row["kept_epoch"]) == (wanted["step"], wanted["epoch"])
        assert (row["val"]["top1"], row["val"]["loss"]) == (wanted["top1"], wanted["loss"])
        assert row["train_loss"] == trained["loss"]
    assert json.loads((folder / "model/model.json").read_text())["metrics"]["loss"] == row["val"]["loss"]


def test_whose_statistics_count_is_told_where_ranks_have_their_own(tmp_path: Path) -> None:
    """Not on one rank, and not of a phase whose norms are frozen."""
    steps = {"steps": 1, "lr": 0.05}
    recipe = write_recipe(tmp_path, phases={"head": {"train": "head", **steps}, "all": {"train": "all", **steps}})
    told = {world: run(["--config", str(recipe), "--run.name", f"on-{world}"], cwd=tmp_path, world=world).err() for world in (1, 2)}
    assert "separate running statistics" not in told[1]
    lines = [line for line in told[2].splitlines() if "separate running statistics" in line]
    assert lines == ["phase all: 2 norms keep separate running statistics on each rank; those of rank 0 are evaluated and saved"]


def test_a_machine_without_proc_trains_all_the_same(tmp_path: Path) -> None:
    before = {"before": "obstacles:no_proc"}
    job = run(["--config", str(write_recipe(tmp_path, **SHORT))], cwd=tmp_path, world=2, by_rank={0: before, 1: before})
    assert "lost rank" not in job.err()
    assert status(tmp_path / "runs/tiny")["state"] == "done"
