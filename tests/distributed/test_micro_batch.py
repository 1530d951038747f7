"""data.micro_batch_size: auto. A network that runs out of memory above some number of images, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
import recipes

PHASES = {"head": {"train": "head", "steps": 2}, "all": {"train": "all", "steps": 3, "lr": 0.05, "ema": 0.9}}


def recipe(folder: Path, **options: Any) -> list[str]:
    """120 images a step; `fits`: how many the network takes at once, `least`: how many on the last rank."""
    return ["--config", str(recipes.write_recipe(folder, data={"workers": 0}, model={"name": "networks:hungry", "options": options}, phases=PHASES))]


@pytest.mark.parametrize(("world", "options", "fits"), [(1, {"fits": 16}, 15), (2, {"fits": 40, "least": 8, "in_backward": True}, 8)])
def test_it_halves_until_all_ranks_fit_and_trains_as_if_told_so(tmp_path: Path, world: int, options: dict[str, Any], fits: int) -> None:
    arguments = recipe(tmp_path, **options)
    job = harness.run([*arguments, "--run.name", "auto"], cwd=tmp_path, world=world)
    harness.run([*arguments, "--run.name", "told", "--data.micro-batch-size", str(fits)], cwd=tmp_path, world=world)
    assert recipes.weights_hash(tmp_path / "runs/auto") == recipes.weights_hash(tmp_path / "runs/told"), "the trials left a trace"
    said = job.err()
    assert said.count("does not fit into memory (rank ") == 3 * len(PHASES)
    assert f"phase all: micro-batches of {fits} fit, 8 per step on each of {world} process{'es' if world > 1 else ''}; the global batch stays 120" in said
    if world == 2:
        assert "a micro-batch of 60 images does not fit into memory (rank 0: out of memory for 60 images); trying 30" in said
        assert "a micro-batch of 15 images does not fit into memory (rank 1: out of memory for 15 images); trying 8" in said

    # A longer last phase goes on with what fitted, without trying more.
    longer = harness.run([*arguments, "--run.name", "auto", "--phases.all.steps", "5"], cwd=tmp_path, world=world)
    assert "do not fit" not in longer.err()
    assert harness.status(tmp_path / "runs/auto")["step"] == 7


def test_not_even_one_image_is_one_line(tmp_path: Path) -> None:
    job = harness.run(recipe(tmp_path, fits=0), cwd=tmp_path, code=2)
    assert "not even 1 image fits into memory (rank 0: out of memory for 1 images)" in job.err()
    assert "checkpoint_activations" in job.err()
    assert "Traceback" not in job.err()


def test_a_step_that_runs_out_of_memory_later_says_what_to_do(tmp_path: Path) -> None:
    arguments = [*recipe(tmp_path, fits=16), "--data.micro-batch-size", "30"]
    job = harness.run(arguments, cwd=tmp_path, code=1)
    assert "--data.micro-batch-size 15 resumes from the newest checkpoint" in job.err()
    assert harness.status(tmp_path / "runs/tiny")["state"] == "failed"


def test_a_synchronised_norm_is_tried_without_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs a trial inside SyncBatchNorm would wait for ranks that have run out of memory."""
    import torch
    from torch import nn

    from dtl.models.norms import norms_alone

    def waits(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it would wait for the other ranks")

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", waits)
    norm, images = nn.SyncBatchNorm(3), torch.randn(4, 3, 2, 2)
    with norms_alone():
        torch.testing.assert_close(norm(images), nn.BatchNorm2d(3)(images))
    with pytest.raises(AssertionError, match="it would wait"):
        norm(images)
