"""Several GPUs, a rank on each: norms over all of them, contexts, memory that ends on one, and ranks that die or fail."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, history, run, start, status, steps_done, the_line, wait_for
from recipes import write_images, write_recipe


@pytest.fixture(autouse=True)
def _two(device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"these need two GPUs, here are {torch.cuda.device_count()}")


def on_both(hook: str) -> dict[int, dict[str, Any]]:
    return {rank: {"before": hook} for rank in range(2)}


def losses(folder: Path, kind: str) -> list[float]:
    return [event["loss"] for event in history(folder / "runs/tiny") if event["event"] == kind]


def test_norms_of_timm_over_all_ranks(tmp_path: Path) -> None:
    """Of the images of a step on two GPUs what one GPU makes of them; and what is validated is what is saved."""
    model = {"name": "timm/mobilenetv3_small_050", "sync_bn": True}
    phases = {"all": {"train": "all", "steps": 3, "lr": 0.001}}
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        recipe = write_recipe(folder, model=model, phases=phases, data={"image_size": 32, "global_batch_size": 24}, tracking={"log_every": 1})
        run(["--config", str(recipe)], cwd=folder, world=world)
        found[world] = losses(folder, "train")
        (validated,) = losses(folder, "val")
        run(["runs/tiny", "--json", "found.json"], cwd=folder, command="evaluate")
        assert json.loads((folder / "found.json").read_text())["loss"] == pytest.approx(validated, rel=1e-3)
    assert found[2] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("decode", ["workers", "device"])
def test_a_rank_has_a_context_on_its_own_gpu_alone(tmp_path: Path, device: str, decode: str) -> None:
    if device == "cpu":
        pytest.skip("contexts are a matter of GPUs")
    images = write_images(tmp_path / "images", {"one": 20, "two": 24})
    data = {"train": str(images), "val_fraction": 0.25, "global_batch_size": 8, "augment": {"preset": "imagenet"}, "decode": decode}
    recipe = write_recipe(tmp_path, data=data, phases={"all": {"train": "all", "epochs": 1, "lr": 0.05}})
    job = run(["--config", str(recipe)], cwd=tmp_path, world=2, by_rank=on_both("gpu.hooks:contexts"))
    for rank in range(2):
        assert f"contexts [{rank}]" in job.err(rank)


def test_fp16_with_its_scaler(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases={"all": {"train": "all", "epochs": 2, "lr": 0.05, "clip_norm": 5.0}}, precision="fp16")
    run(["--config", str(recipe)], cwd=tmp_path, world=2)
    validated = losses(tmp_path, "val")
    assert validated[-1] < validated[0]


def test_memory_that_ends_on_one_rank_halves_the_micro_batches_of_all(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases={"all": {"train": "all", "steps": 2, "lr": 0.05}}, data={"image_size": 128})
    job = run(["--config", str(recipe)], cwd=tmp_path, world=2, env={"LITTLE_MEMORY": "64"}, by_rank={1: {"before": "gpu.hooks:little_memory"}})
    assert re.search(r"a micro-batch of 60 images does not fit into memory \(rank 1: .*\); trying 30", job.err())
    assert "does not fit into memory (rank 0" not in job.err()
    assert re.search(r"phase all: micro-batches of \d+ fit", job.err())
    assert status(tmp_path / "runs/tiny")["state"] == "done"


# ---- lost ranks: the others stand in a device's wait behind a collective that never ends


def begin(folder: Path, **more: Any) -> Job:
    recipe = write_recipe(folder, phases={"all": {"train": "all", "epochs": 500, "lr": 0.01}}, data={"workers": 0}, tracking={"log_every": 1})
    return start(["--config", str(recipe)], cwd=folder, world=2, **more)


def test_a_rank_that_was_killed(tmp_path: Path) -> None:
    job = begin(tmp_path)
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or steps_done(tmp_path / "runs/tiny") > 2, what="some steps")
    job.kill(1)
    killed = time.monotonic()
    job.wait(120)
    assert time.monotonic() - killed < 20
    assert job.codes == [1, -9]
    assert re.search(rf"lost rank 1 \(host \S+, pid {job.processes[1].pid}\), which has ended; it was last in stage \w+ of step \d+;", the_line(job))
    assert status(tmp_path / "runs/tiny")["why"].startswith("fault: lost rank 1")


def test_a_rank_that_fails(tmp_path: Path) -> None:
    job = begin(tmp_path, by_rank={1: {"before": "obstacles:failing_step"}}).wait(60)
    assert job.codes == [1, 1]
    assert "ZeroDivisionError: of one rank alone" in job.err(1)
    assert re.search(r"dtl: lost rank 1 \(host \S+, pid \d+\), which ended: of one rank alone", job.err(0)), job.err(0)
    assert status(tmp_path / "runs/tiny")["state"] == "failed"
