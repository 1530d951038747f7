"""Pretrained weights on several ranks: planned once, the same everywhere, or one clear line and nothing loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from harness import run, status
from networks import small
from recipes import write_recipe

OTHER = {1: {"before": "other_home:move"}}


def saved(folder: Path, *, seed: int, changed: bool = False) -> None:
    """Weights of the recipe's network with another head, with running means that look trained."""
    torch.manual_seed(seed)
    state = small(num_classes=7).state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_()
    if changed:
        next(iter(state.values())).add_(1)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "weights.pth")


def recipe(folder: Path) -> list[str]:
    phases = {"all": {"train": "all", "steps": 1, "lr": 0.01}}
    return ["--config", str(write_recipe(folder, transfer={"source": "~/weights.pth"}, phases=phases))]


def test_two_ranks_load_one_plan(tmp_path: Path) -> None:
    saved(tmp_path / "home", seed=1)
    job = run(recipe(tmp_path), cwd=tmp_path, world=2, env={"HOME": str(tmp_path / "home")})
    report = json.loads((tmp_path / "runs/tiny/transfer.json").read_text())
    assert report["coverage"] == 1.0
    assert report["checksum"]
    assert len(report["plan"]) == 64
    assert (job.out() + job.err()).count("coverage 100.0%") == 1


def test_a_rank_with_another_file_stops_all_with_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1)
    saved(tmp_path / "b", seed=1, changed=True)
    job = run(recipe(tmp_path), cwd=tmp_path, world=2, code=2, env={"HOME": str(tmp_path / "a")}, by_rank=OTHER)
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert len(lines) == 1, job.err()
    assert "ranks disagree on the pretrained weights' file: rank 0 has" in lines[0]
    assert "Traceback" not in job.err()
    assert status(tmp_path / "runs/tiny")["state"] == "failed"


def test_a_rank_without_the_file_stops_all_with_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1)
    (tmp_path / "b").mkdir()
    job = run(recipe(tmp_path), cwd=tmp_path, world=2, code=2, env={"HOME": str(tmp_path / "a")}, by_rank=OTHER)
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert len(lines) == 1, job.err()
    assert f"no pretrained weights at {tmp_path / 'b/weights.pth'}" in lines[0]
