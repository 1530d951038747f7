"""`phases.NAME.image_size`: each phase at its own size, killed in each of them or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import history, run, start, status
from recipes import weights_hash, write_recipe

PHASES = {
    "pretext": {"task": "rotate", "train": "all", "steps": 4, "lr": 0.05, "image_size": 12},
    "small": {"train": "head", "steps": 4, "lr": 0.1, "cache_features": True},
    "oblong": {"train": "head", "steps": 4, "lr": 0.1, "cache_features": True, "image_size": [12, 20]},
    "large": {"train": "all", "steps": 6, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "eval_every": 0.3, "image_size": 24},
}


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_killed_in_each_phase_it_ends_as_if_nothing_had_happened(tmp_path: Path, world: int) -> None:
    hooks = {rank: {"before": "kill_hooks:at_a_step"} for rank in range(world)}
    arguments = [["--config", str(write_recipe(tmp_path, name, phases=PHASES, checkpoint={"every_steps": 3}))] for name in ("whole", "killed")]
    dry = run([*arguments[0], "--dry-run"], cwd=tmp_path)
    job = run(arguments[0], cwd=tmp_path, world=world)
    for step in (2, 7, 11, 17):
        killed = start(arguments[1], cwd=tmp_path, world=world, env={"KILL_AT": str(step)}, by_rank=hooks)
        assert killed.wait().codes == [-9] * world, killed.err()
    run(arguments[1], cwd=tmp_path, world=world)
    whole, killed_run = tmp_path / "runs/whole", tmp_path / "runs/killed"
    assert status(killed_run)["state"] == "done"
    assert weights_hash(killed_run) == weights_hash(whole)
    assert history(killed_run) == history(whole)
    facts = json.loads((killed_run / "model/model.json").read_text())
    assert facts["preprocessing"]["image_size"] == facts["preprocessing"]["transform"]["geometry"]["image_size"] == 24
    assert facts["made_by"]["preprocessing"]["image_size"] == "phases.large.image_size"
    for name, size in (("pretext", "12"), ("small", "16"), ("oblong", "[12, 20]"), ("large", "24")):
        for said in (dry, job):
            assert f", images of {size} pixels, " in next(line for line in said.err(0).splitlines() if line.startswith(f"phase {name}: ") and "epoch" in line)
    assert job.err(0).count(" computed once in ") == 2, "features of each size are others"
    again = run(["runs/killed", "--json", "again.json"], cwd=tmp_path, command="evaluate")
    assert again.codes == [0]
    top1 = json.loads((tmp_path / "again.json").read_text())["top1"]
    assert top1 == status(killed_run)["phases"][-1]["val"]["top1"], "evaluated at the size of the last phase"
