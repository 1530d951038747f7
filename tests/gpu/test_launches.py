"""Which GPU a rank takes, whatever its launcher lets it see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import history, run, the_line
from recipes import write_recipe

PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 4, "lr": 0.05}}


def need(number: int, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < number:
        pytest.skip(f"this needs {number} GPUs, here are {torch.cuda.device_count()}")


def launched(folder: Path, *, world: int, before: str | None = None, code: int = 0, **env: str) -> Any:
    recipe = write_recipe(folder, phases=PHASES, precision="no")
    by_rank = {rank: {"before": before} for rank in range(world)} if before else None
    return run(["--config", str(recipe)], cwd=folder, world=world, by_rank=by_rank, env=env, code=code)


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in history(folder / "runs/tiny") if event["event"] in ("train", "val")]


def test_a_rank_that_sees_one_gpu_takes_it(tmp_path: Path, device: str) -> None:
    need(2, device)
    found = []
    for before in (None, "gpu.hooks:own_gpu"):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        assert "2 processes on cuda" in launched(folder, world=2, before=before).err(0)
        found.append(losses(folder))
    assert found[0] == found[1] if device == "sim" else found[0] == pytest.approx(found[1], rel=1e-3)


def test_nobody_says_how_many_processes_a_node_has(tmp_path: Path, device: str) -> None:
    need(4, device)
    assert "4 processes on cuda" in launched(tmp_path, world=4, before="gpu.hooks:two_nodes", SIMCUDA_DEVICES="4").err(0)


def test_two_ranks_on_one_gpu_are_refused(tmp_path: Path, device: str) -> None:
    job = launched(tmp_path, world=2, code=2, CUDA_VISIBLE_DEVICES="0")
    line = the_line(job)
    assert line.startswith("dtl: rank 0 and rank 1 have the same GPU (GPU-"), line
    assert line.endswith("): 2 processes on 1 GPU; launch one process per GPU, or use --run.device cpu")


@pytest.mark.parametrize(("capability", "precision"), [("75", "no"), ("80", "bf16")])
def test_float32_where_fp16_would_be_faster_is_named(tmp_path: Path, device: str, capability: str, precision: str) -> None:
    if device != "sim":
        pytest.skip("the test needs GPUs of two compute capabilities, which only simulated ones take; --device sim runs it")
    recipe = write_recipe(tmp_path, phases=PHASES)
    job = run(["--config", str(recipe), "--precision", "auto"], cwd=tmp_path, env={"SIMCUDA_CC": capability})
    assert f"1 process on cuda, precision {precision}" in job.err()
    lines = [line for line in job.err().splitlines() if "--precision fp16" in line]
    assert lines == ["Simulated GPU 0 has no bf16, so precision auto computes in float32: --precision fp16 is usually several times faster on it"] * (
        precision == "no"
    )
