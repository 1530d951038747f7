"""Streams and waits: no two of them race, and the host waits for its device at log lines, evaluations and checkpoints, but not in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import run, status
from recipes import write_recipe

PHASES: dict[str, Any] = {
    "pretext": {"task": "rotate", "train": "all", "steps": 3, "lr": 0.05},
    "all": {"train": "all", "epochs": 0.5, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 5.0},
}


@pytest.fixture(autouse=True)
def _a_gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("CPUs have no streams")


@pytest.mark.parametrize(("world", "precision"), [(1, "bf16"), (1, "fp16"), (2, "no")])
def test_the_host_does_not_wait_in_a_step(tmp_path: Path, world: int, precision: str) -> None:
    recipe = write_recipe(tmp_path, phases=PHASES, precision=precision, model={"sync_bn": True})  # over two ranks
    job = run(["--config", str(recipe)], cwd=tmp_path, world=world, by_rank={rank: {"before": "gpu.hooks:no_waits_in_a_step"} for rank in range(world)})
    steps = 9 - (2 if world == 2 else 0)
    assert job.err(0).count("a step with 0 waits") == steps
    assert job.err(0).count("of the scaler") <= (steps if precision == "fp16" else 0)


def test_no_two_streams_race(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases=PHASES, data={"workers": 0})
    job = run(["--config", str(recipe)], cwd=tmp_path, by_rank={0: {"before": "gpu.hooks:sanitizer"}})
    assert "CSAN detected" not in job.err()
    assert status(tmp_path / "runs/tiny")["state"] == "done"
