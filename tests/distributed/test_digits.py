"""The README's main job, whole: the built-in example, launched as a new user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import history, run, status
from launchers import ROOT, launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "dtl/train.py")]
    # One thread: two beside another test on two cores wait for each other, for minutes.
    return folder, launch(command, folder, limit=1200, OMP_NUM_THREADS="1")


def test_it_runs_through_its_phases_to_97_percent(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    result = status(folder / "runs/digits")
    assert result["state"] == "done"
    assert [phase["phase"] for phase in result["phases"]] == ["pretext", "head", "all"]
    assert result["phases"][-1]["val"]["top1"] >= 0.97
    assert result["phases"][-1]["val"]["num_samples"] == 360
    assert result["phases"][0]["val"]["num_samples"] == 4 * 360, "four rotations of each image"


def test_it_says_what_it_does_and_what_comes_next(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    for words in ("packing digits", "phase pretext: rotate", "validation loss", "images/s", "top1", "model.safetensors", "next  "):
        assert words in done.stderr, words
    for part in ("config.yaml", "status.json", "history.jsonl", "checkpoints", "model/model.json", "report/index.html"):
        assert (folder / "runs/digits" / part).exists(), part


def test_the_history_tells_every_epoch_once(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    events = history(folder / "runs/digits")
    evaluations = [event for event in events if event["event"] == "val"]
    entering = [event for event in evaluations if event.get("entering")]
    assert [event["phase"] for event in entering] == ["all"], "the others begin with a new head"
    evaluations = [event for event in evaluations if event not in entering]
    assert [event["epoch"] for event in evaluations] == list(range(len(evaluations)))
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)


def test_the_model_can_be_evaluated_and_used(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder, _ = finished
    run([str(folder / "runs/digits"), "--json", "metrics.json"], cwd=tmp_path, command="evaluate", env={"DTL_CACHE": str(folder / "cache")})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = status(folder / "runs/digits")["phases"][-1]["val"]
    assert metrics["top1"] == expected["top1"]
    assert metrics["num_samples"] == expected["num_samples"]


def test_an_export_is_compared_on_the_runs_own_images(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder, _ = finished
    command = [str(folder / "runs/digits"), "--to", "safetensors", "--out", "digits.safetensors"]
    done = run(command, cwd=tmp_path, command="export", env={"DTL_CACHE": str(folder / "cache")})
    assert "checked against PyTorch on 8 of the run's validation images" in done.out()
