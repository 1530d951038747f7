"""`model.compile`: batches have one size by design, so that each phase is compiled once; and steps without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run
from recipes import write_recipe


@pytest.mark.parametrize("size", [50, "auto"])
def test_each_phase_is_compiled_once(tmp_path: Path, size: int | str) -> None:
    """119 does not divide 1,437 images, and 50 does not divide 119: the last batch of an epoch and of a step are padded."""
    phases = {"head": {"train": "head", "steps": 2, "lr": 0.1, "cache_features": False}, "all": {"train": "all", "epochs": 2, "lr": 0.05}}
    data = {"global_batch_size": 119, "micro_batch_size": size, "workers": 0}
    recipe = write_recipe(tmp_path, model={"name": "networks:small", "compile": True}, data=data, phases=phases)
    out = run([str(recipe)], cwd=tmp_path, command="compile_hooks:compiled").out()
    assert out.count("tried\n") == (2 if size == "auto" else 0)
    assert json.loads(out.splitlines()[-1]) == {"graphs": 2, "breaks": 0}


@pytest.mark.parametrize(
    ("command", "world", "options"),
    [("train", 1, ""), ("train", 2, ""), ("train", 2, "--run.gradient-compression bf16 --precision bf16"), ("find-lr", 1, "--steps 20")],
)
def test_runs_of_the_harness_step_without_the_compiler_as_users_do(tmp_path: Path, command: str, world: int, options: str) -> None:
    """With it in memory they would take `optimizer.step`, where users' take dtl.imports.plain_step. The recipe clips, averages and mixes."""
    words = [command, "--config", str(write_recipe(tmp_path)), *options.split()]
    job = run(words, cwd=tmp_path, world=world, command="compile_hooks:usual")
    assert [json.loads(job.out(rank).splitlines()[-1]) for rank in range(world)] == [[]] * world
