"""The real launchers start the real entry point; what they did not start is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import free_port, status
from launchers import ACCELERATE, ROOT, SCRIPT, launch, port
from recipes import write_recipe

PHASES = {"all": {"train": "all", "steps": 3, "lr": 0.05}}


@pytest.mark.parametrize(
    ("name", "processes", "command"),
    [
        ("file-2", 2, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), *port(), SCRIPT]),
        ("module-3", 3, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), "--num_processes", "3", *port(), "-m", "dtl.train"]),
        ("plain", 1, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu.yaml"), SCRIPT]),
        ("torchrun", 2, lambda: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]),
        ("python", 1, lambda: [sys.executable, SCRIPT]),
        ("package", 1, lambda: [sys.executable, "-m", "dtl", "train"]),
    ],
)
def test_a_launch_trains_in_the_world_that_was_asked_for(tmp_path: Path, name: str, processes: int, command) -> None:  # type: ignore[no-untyped-def]
    recipe = write_recipe(tmp_path, phases=PHASES)
    done = launch([*command(), "--config", str(recipe), "--run.name", name], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path / "runs" / name)["state"] == "done"
    assert f"{processes} process{'es' if processes > 1 else ''} on cpu" in done.stderr
    assert done.stderr.count("phase all: classify") == 1, "told by one rank only"


def test_a_launch_that_gives_fewer_processes_than_asked_is_refused(tmp_path: Path) -> None:
    """accelerate launch --cpu --num_processes 2 starts one process, in silence."""
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2", SCRIPT, "--config", str(write_recipe(tmp_path, phases=PHASES))], tmp_path)
    assert done.returncode != 0
    assert "the launcher was asked for 2 processes, but WORLD_SIZE in this process is 1" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failure_is_told_once_and_stands_in_status_json(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases=PHASES)
    command = [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), *port(), SCRIPT, "--config", str(recipe)]
    done = launch([*command, "--model.name", "torchvision/resnet19"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("dtl: ") == 1, done.stderr
    assert status(tmp_path / "runs/tiny")["why"].startswith("input: ")
