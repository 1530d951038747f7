"""In precision `no`, simulated GPUs compute what CPUs compute, bit for bit, and with a line for GPUs broken they do not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gpu.hooks import MUTATIONS
from harness import history, run, start, steps_done, wait_for
from recipes import weights_hash, write_recipe

# Mixing and clipping, an exponential average, three phases, a short last micro-batch, and a checkpoint that nobody waits for at step 6.
PHASES: dict[str, Any] = {
    "pretext": {"task": "rotate", "train": "all", "steps": 2, "lr": 0.05},
    "head": {"train": "head", "steps": 2, "lr": 0.1, "optimizer": "adamw"},
    "all": {"train": "all", "epochs": 0.5, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 5.0, "eval_every": 0.5},
}


def recipe(folder: Path) -> list[str]:
    return ["--config", str(write_recipe(folder, phases=PHASES, data={"micro_batch_size": 50}, checkpoint={"every_steps": 6, "keep": 5}))]


def made(run_folder: Path) -> dict[str, Any]:
    """All that a run leaves behind and that hangs on what its device computed."""
    tensors = {str(file.relative_to(run_folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in run_folder.glob("checkpoints/*/*.safetensors")}
    return {"history": history(run_folder), "weights": weights_hash(run_folder), **tensors}


@pytest.fixture(autouse=True)
def _only_simulated(device: str) -> None:
    if device != "sim":
        pytest.skip("the sums of a real GPU differ from a CPU's in the last bits; simulated GPUs use the CPU's kernels: --device sim runs it")


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_bit_for_bit(tmp_path: Path, world: int) -> None:
    on = {}
    for device in ("cpu", "sim"):
        job = run(
            [*recipe(tmp_path), "--run.name", device],
            cwd=tmp_path,
            world=world,
            device=device,
            by_rank={r: {"before": "gpu.hooks:contexts"} for r in range(world) if device == "sim"},
        )
        assert f"on {'cuda' if device == 'sim' else 'cpu'}," in job.err()
        on[device] = made(tmp_path / "runs" / device)
    assert len(on["sim"]) >= 4
    assert on["sim"] == on["cpu"]
    assert [f"contexts [{rank}]" in job.err(rank) for rank in range(world)] == [True] * world


@pytest.mark.parametrize("world", [1, 2])
def test_cached_features_are_the_same_bit_for_bit(tmp_path: Path, world: int) -> None:
    phases = {"head": {"train": "head", "steps": 6, "lr": 0.1, "cache_features": True}}
    found = []
    for device in ("cpu", "sim"):
        words = ["--config", str(write_recipe(tmp_path, device, phases=phases, data={"cache_dir": f"cache-{device}"}))]
        job = run(words, cwd=tmp_path, world=world, device=device)
        assert "computed once in" in job.err(0)
        files = sorted((tmp_path / f"cache-{device}" / "features").glob("*/*.npy"))
        found.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_a_deterministic_run_notes_what_its_bits_depend_on(tmp_path: Path) -> None:
    words = [*recipe(tmp_path), "--run.deterministic", "true"]
    run([*words, "--run.name", "whole"], cwd=tmp_path, world=2)
    job = start([*words, "--run.name", "killed"], cwd=tmp_path, world=2)
    wait_for(lambda: steps_done(tmp_path / "runs/killed") >= 6 or None, what="step 6")
    job.kill()
    run([*words, "--run.name", "killed"], cwd=tmp_path, world=2)
    assert made(tmp_path / "runs/killed") == made(tmp_path / "runs/whole")
    state = json.loads(next((tmp_path / "runs/whole/checkpoints").glob("step-*/state.json")).read_text())
    chosen = {name: value for name, value in state["kernels"].items() if name not in ("torch", "GPU")}
    assert chosen == {"run.deterministic": "true", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("on-cpu")
    run(recipe(folder), cwd=folder, device="cpu")
    return made(folder / "runs/tiny")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_line_is_noticed(tmp_path: Path, on_cpu: dict[str, Any], mutation: str) -> None:
    job = start(recipe(tmp_path), cwd=tmp_path, env={"MUTATION": mutation}, by_rank={0: {"before": "gpu.hooks:broken"}}).wait()
    assert f"broken: {mutation}\n" in job.err(), "the line is another one now"
    assert job.codes != [0] or made(tmp_path / "runs/tiny") != on_cpu
