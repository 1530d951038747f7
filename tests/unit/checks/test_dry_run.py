"""`dtl train --dry-run`: what a start needs is checked and fetched, and the run folder stays as it is."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import networks
import pytest
import torch
from bad_server import Server
from harness import history, run, start, status, the_line, wait_for
from model_folders import model_folder
from recipes import weights_hash, write_images, write_recipe
from torch import nn

from dtl.checks.dry_run import saved_bytes
from dtl.data.packing.pack import pack
from dtl.models.freeze import freeze

ALL = {"all": {"train": "all", "steps": 4, "lr": 0.01}}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_it_says_what_the_run_would_be_and_leaves_no_folder(tmp_path: Path) -> None:
    recipe = ["--config", str(write_recipe(tmp_path))]
    err = run([*recipe, "--dry-run"], cwd=tmp_path, packed=False).err()
    assert "packing digits" in err
    assert not (tmp_path / "runs").exists()
    assert "data: 1,437 training images of 10 classes in " in err
    assert "network: networks:small, " in err
    lines = [line for line in err.splitlines() if line.startswith("phase ")]
    assert [line.split(",")[0] for line in lines[::2]] == ["phase pretext: rotate", "phase head: classify", "phase all: classify"]
    assert all("memory of each of 1 process in float32, about " in line for line in lines[1::2])
    assert "moving average" in lines[-1]
    assert err.splitlines()[-1] == "dry run done: this run can start; nothing was written to runs/tiny"

    started = run(recipe, cwd=tmp_path).err()
    assert "packing" not in started, "it was packed by the dry run"
    assert all(line in started for line in lines[::2]), "the phases are those of the run"
    assert status(tmp_path / "runs/tiny")["incarnation"] == 1


def test_a_run_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    recipe, folder = ["--config", str(write_recipe(tmp_path, phases=ALL))], tmp_path / "runs/tiny"
    run(recipe, cwd=tmp_path)
    before = files_in(folder)
    assert "runs/tiny has no step left to train (it ended at step 4)" in run([*recipe, "--dry-run"], cwd=tmp_path).err()
    more = [*recipe, "--phases.all.steps", "6", "--dry-run"]
    assert "runs/tiny would resume at step 4, from step-00000004" in run(more, cwd=tmp_path).err()
    assert "run.seed" in the_line(run([*more, "--run.seed", "7"], cwd=tmp_path, code=2))
    assert "would resume" not in run([*more, "--run.seed", "7", "--run.resume", "never"], cwd=tmp_path).err()
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transfer.source", "nowhere.pt"], "nowhere.pt"),
        (["--phases.all.train", "[nothing.*]"], "phase all: train: the pattern 'nothing.*' matches no parameter"),
        (["--data.train", "nowhere"], "nowhere"),
        (["--transfer.source", "model", "--transfer.min_coverage", "1.0", "--model.name", "networks:without_norms"], "coverage"),
        (["--run.dir", "."], "is not empty"),
    ],
)
def test_it_refuses_what_the_start_would_refuse(tmp_path: Path, options: list[str], message: str) -> None:
    model_folder(tmp_path / "model")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/mine.txt").write_text("mine")
    recipe = ["--config", str(write_recipe(tmp_path, phases=ALL))]
    refused = run([*recipe, *options, "--dry-run"], cwd=tmp_path, code=2).err()
    assert message in refused
    assert "Traceback" not in refused
    assert not (tmp_path / "runs").exists()
    assert "dtl: " in run([*recipe, *options], cwd=tmp_path, code=2).err()


def test_a_login_node_needs_no_gpu_and_no_job(tmp_path: Path) -> None:
    recipe = ["--config", str(write_recipe(tmp_path, phases=ALL)), "--dry-run"]
    job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_GPUS": "0,1,2,3", "WORLD_SIZE": "8"}
    err = run([*recipe, "--run.device", "cuda", "--precision", "fp16"], cwd=tmp_path, env=job).err()
    assert "memory of each of 8 processes" in err
    assert "activations of 15 images" in err
    assert "global_batch_size 4 is smaller than the 8 processes" in the_line(run([*recipe, "--data.global-batch-size", "4"], cwd=tmp_path, env=job, code=2))


def test_one_process_of_a_launch_works_for_all(tmp_path: Path) -> None:
    job = run(["--config", str(write_recipe(tmp_path, phases=ALL)), "--dry-run"], cwd=tmp_path, world=2)
    assert "memory of each of 2 processes" in job.err(0)
    assert job.err(1) == ""


def test_afterwards_the_run_needs_no_network(tmp_path: Path) -> None:
    """The packed folder, its shards and the weights come from a server that is gone when the run starts."""
    pack("digits", tmp_path / "www/digits", shard_bytes=300_000, processes=1, progress=False)
    weights = model_folder(tmp_path / "weights") / "model.safetensors"
    shutil.copy(weights, tmp_path / "www/net.safetensors")
    recipe = ["--config", str(write_recipe(tmp_path, phases=ALL)), "--data.retries", "0", "--transfer.keep_head", "false"]
    env = {"TORCH_HOME": str(tmp_path / "torch")}
    with Server(tmp_path / "www") as server:
        recipe += ["--data.train", f"{server.url}/digits", "--transfer.source", f"{server.url}/net.safetensors"]
        assert "downloading shards to " in run([*recipe, "--dry-run"], cwd=tmp_path, env=env).err()
    err = run(recipe, cwd=tmp_path, env=env).err()
    assert "using the copy of its manifest and index in " in err
    assert status(tmp_path / "runs/tiny")["state"] == "done"
    local = [*recipe[:-4], "--data.train", str(tmp_path / "www/digits"), "--transfer.source", str(weights), "--run.name", "local"]
    run(local, cwd=tmp_path)
    assert weights_hash(tmp_path / "runs/tiny") == weights_hash(tmp_path / "runs/local")
    assert history(tmp_path / "runs/tiny")


def test_a_signal_ends_it_and_what_was_packed_is_kept(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", {"cat": 80, "dog": 80})
    data = {"train": str(photos), "val_fraction": 0.2, "workers": 0, "global_batch_size": 16}
    words = ["--config", str(write_recipe(tmp_path, phases=ALL, data=data)), "--dry-run"]
    (tmp_path / "hold").touch()
    job = start(words, cwd=tmp_path, by_rank={0: {"before": "packing_hooks:slow_children"}})
    wait_for((tmp_path / "held").exists, what="the packing")
    job.kill(0, signal.SIGTERM)
    job.wait().check(75)
    assert "dry run stopped by a signal" in job.err()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "hold").unlink()
    run(words, cwd=tmp_path)


def test_what_autograd_keeps_is_counted() -> None:
    """A linear layer keeps its input, a ReLU its output, which is the next layer's input; frozen layers keep nothing."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    images = torch.empty(4, 3, 2, 2, device="meta")
    assert saved_bytes(module, images) == 4 * (4 * 12 + 4 * 5)
    freeze(module, {"3.weight", "3.bias"})
    assert saved_bytes(module, images) == 4 * 4 * 5
    assert saved_bytes(networks.diverging(3), images) is not None
