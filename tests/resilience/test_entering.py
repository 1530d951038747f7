"""The evaluation before a phase's first step: what entered a phase that only does harm leaves it again, through any kill, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import history, run, status
from recipes import weights_hash, write_recipe
from safetensors.torch import load_file

HEAD = {"train": "head", "steps": 8, "lr": 0.1, "optimizer": "adamw"}
HARMS = {"train": "all", "steps": 3, "lr": 30.0, "schedule": "constant", "eval_every": 0.1}
SMALL = {"global_batch_size": 120, "workers": 0, "micro_batch_size": 32}


def recipe(folder: Path, **sections: Any) -> list[str]:
    return ["--config", str(write_recipe(folder, **{"phases": {"head": HEAD, "all": HARMS}, "data": SMALL, **sections}))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder), cwd=folder)
    return folder / "runs/tiny"


def test_a_phase_that_does_harm_hands_on_what_entered_it(whole: Path) -> None:
    head, last = status(whole)["phases"]
    assert (last["kept_step"], last["kept_epoch"], last["train_loss"]) == (head["kept_step"], None, None) == (8, None, None)
    assert last["val"] == head["val"]
    assert (head["looks"], last["looks"]) == (1, 1 + 3)
    told = [event for event in history(whole) if event["event"] == "val"]
    assert [(event["phase"], event["step"], event["kept"], event.get("entering", False)) for event in told] == [
        ("head", 8, True, False), ("all", 8, True, True), ("all", 9, False, False), ("all", 10, False, False), ("all", 11, False, False),
    ]  # fmt: skip
    assert last["best"]["step"] > 8, "early stopping goes by the phase's own evaluations"
    folder = whole.parent.parent
    run([*recipe(folder), "--phases.all", "null", "--run.name", "head"], cwd=folder)
    assert weights_hash(whole) == weights_hash(folder / "runs/head")


@pytest.mark.parametrize("where", ["in_the_entering_evaluation", "stopped_in_the_entering_evaluation", "before_the_first_step_of_the_second_phase"])
def test_killed_there_it_ends_the_same(tmp_path: Path, whole: Path, where: str) -> None:
    job = run(recipe(tmp_path), cwd=tmp_path, by_rank={0: {"before": f"kill_hooks:{where}"}}, code=75 if "stopped" in where else -9)
    assert status(tmp_path / "runs/tiny")["step"] == 8 or "stopped" not in where, job.err()
    run(recipe(tmp_path), cwd=tmp_path)
    assert history(tmp_path / "runs/tiny") == history(whole)
    assert weights_hash(tmp_path / "runs/tiny") == weights_hash(whole)


def test_a_first_phase_with_a_pretrained_head_is_looked_at_too_and_what_is_stored_goes_on(tmp_path: Path, whole: Path) -> None:
    """Stopped in that evaluation, where the checkpoint is of step 0; and two ranks decide as one does."""
    transfer = {"source": str(whole), "keep_head": True}
    arguments = recipe(tmp_path, phases={"all": HARMS}, transfer=transfer)
    run(arguments, cwd=tmp_path, by_rank={0: {"before": "kill_hooks:stopped_in_the_entering_evaluation"}}, code=75)
    folder = tmp_path / "runs/tiny"
    assert sorted(file.name for file in (folder / "checkpoints").iterdir() if file.name.startswith("step-")) == ["step-00000000"]
    run(arguments, cwd=tmp_path, world=2)
    (row,) = status(folder)["phases"]
    assert (row["kept_step"], row["looks"]) == (0, 4)
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (folder, whole))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_a_run_that_was_started_under_the_old_rule_names_it_for_each_phase(tmp_path: Path, whole: Path) -> None:
    phases = {"head": {**HEAD, "steps": 1, "keep": "best"}, "all": {**HARMS, "steps": 1, "keep": "best"}}
    run(recipe(tmp_path, phases=phases), cwd=tmp_path)
    assert [event.get("entering") for event in history(tmp_path / "runs/tiny") if event["event"] == "val"] == [None, None]
    phases = {name: {key: value for key, value in phase.items() if key != "keep"} for name, phase in phases.items()}
    phases["all"]["steps"] = 2
    old = ["--phases.head.keep", "best", "--phases.all.keep", "best"]
    job = run(recipe(tmp_path, phases=phases), cwd=tmp_path, code=2)
    assert f"now it is 'one_se', its default, which may have changed: go on with {' '.join(old)}" in job.err()
    run([*recipe(tmp_path, phases=phases), *old], cwd=tmp_path)
    assert status(tmp_path / "runs/tiny")["step"] == 3
