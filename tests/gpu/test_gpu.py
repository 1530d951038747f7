"""What a GPU does in its own way: precisions and the scaler, stopping and going on, decoding on the device, evaluation."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import history, run, start, status, steps_done, wait_for
from recipes import write_images, write_recipe

PRECISIONS = ["no", "bf16", "fp16"]
PHASES: dict[str, Any] = {
    "head": {"train": "head", "steps": 6, "lr": 0.1},
    "all": {"train": "all", "epochs": 2, "lr": 0.05, "ema": 0.9, "clip_norm": 5.0},
}


def no_fp16_on_cpus(device: str, precision: str) -> None:
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("precision fp16 is refused on CPUs (tests/unit/distributed/test_launch.py); --device sim and cuda compute in it")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns_and_is_evaluated_alike(tmp_path: Path, device: str, precision: str) -> None:
    no_fp16_on_cpus(device, precision)
    recipe = write_recipe(tmp_path, phases=PHASES, precision=precision)
    job = run(["--config", str(recipe)], cwd=tmp_path)
    assert f"process on {'cpu' if device == 'cpu' else 'cuda'}" in job.err()
    assert f"precision {precision}" in job.err()
    events = history(tmp_path / "runs/tiny")
    losses = [event["loss"] for event in events if event["event"] == "val" and event["phase"] == "all"]
    assert all(math.isfinite(event["loss"]) for event in events if event["event"] in ("train", "val"))
    assert losses[-1] < losses[0]
    found = tmp_path / "found.json"
    run(["runs/tiny", "--json", str(found)], cwd=tmp_path, command="evaluate")
    best = max(event["top1"] for event in events if event["event"] == "val" and event["phase"] == "all")
    assert json.loads(found.read_text())["top1"] == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_stops_and_goes_on(tmp_path: Path, device: str, precision: str) -> None:
    no_fp16_on_cpus(device, precision)
    recipe = write_recipe(tmp_path, phases=PHASES, precision=precision, model={"name": "paced:small"})
    hold = tmp_path / "hold"
    hold.touch()
    job = start(["--config", str(recipe)], cwd=tmp_path, env={"HOLD": str(hold), "QUICK_STEPS": "16"})  # lines come one late
    wait_for(lambda: steps_done(tmp_path / "runs/tiny") >= 8, what="the second phase")
    os.kill(job.processes[0].pid or 0, signal.SIGTERM)
    hold.unlink()
    job.wait().check(75)
    stopped = status(tmp_path / "runs/tiny")["step"]
    run(["--config", str(recipe)], cwd=tmp_path, env={"HOLD": str(hold)})
    steps = [event["step"] for event in history(tmp_path / "runs/tiny") if event["event"] == "train"]
    assert 8 <= stopped < steps[-1] == 6 + 2 * 12
    assert steps == sorted(set(steps))


def test_decoding_on_the_device_learns_the_same(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"one": 20, "two": 24})
    data = {"train": str(images), "val_fraction": 0.25, "global_batch_size": 8, "augment": {"preset": "imagenet"}}
    losses = {}
    for decode in ("workers", "device"):
        recipe = write_recipe(tmp_path, decode, data={**data, "decode": decode}, phases={"all": {"train": "all", "epochs": 2, "lr": 0.05}})
        run(["--config", str(recipe)], cwd=tmp_path)
        losses[decode] = [event["loss"] for event in history(tmp_path / "runs" / decode) if event["event"] == "val"]
    assert losses["device"] == pytest.approx(losses["workers"], rel=0.02)
