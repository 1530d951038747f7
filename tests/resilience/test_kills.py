"""SIGKILL at random moments, anywhere, again and again; what comes out is what an uninterrupted run gives.

A few kills in the normal test run; `pytest tests/resilience/test_kills.py --kills 100` for a soak.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Job, start
from recipes import write_recipe

from dtl.checks.resume import check
from dtl.commands import verify_resume
from dtl.errors import UserError

SHORT: dict[str, Any] = {
    "pretext": {"task": "rotate", "train": "all", "steps": 3, "lr": 0.05},
    "head": {"train": "head", "steps": 3, "lr": 0.1, "optimizer": "adamw"},
    "all": {"train": "all", "steps": 10, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "weight_decay": 0.001, "clip_norm": 5.0, "eval_every": 0.3},
}


class Ranks:
    """A start in processes that are forked from the warm server."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.job.processes)

    def kill(self) -> None:
        for process in self.job.processes:
            if process.is_alive() and process.pid is not None:
                # Each rank leads a group once it has begun; its loader processes go with it.
                while os.getpgid(process.pid) != process.pid:
                    time.sleep(0.001)
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.job.processes:
            process.join()

    def codes(self) -> list[int | None]:
        return self.job.codes

    def text(self) -> str:
        return self.job.err()


@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere_it_ends_as_if_nothing_had_happened(tmp_path: Path, world: int, request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("--kills")
    recipe = write_recipe(tmp_path, phases=SHORT, checkpoint={"every_steps": 2})

    def launch(arguments: Sequence[str], variables: dict[str, str]) -> Ranks:
        return Ranks(start(arguments, cwd=tmp_path, world=world, env=variables))

    lines: list[str] = []
    result = check(launch, ["--config", str(recipe)], tmp_path, kills=kills // 2, world=world, seed=world, fresh_cache=True, timeout=120, log=lines.append)
    print("\n".join([f"world of {world}", *lines, f"{len(result.kills)} kills in {result.runs} runs, in: {result.where()}"]))
    assert not result.differences, result.differences
    assert len(result.kills) == kills // 2
    assert result.steps == 16
    assert 119 * 16 <= result.slots / result.runs <= 120 * 16  # every slot of every step
    assert any(kill.stage == "data" for kill in result.kills)


def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str, model: str = "networks:small") -> int:
    """The command, with ranks that start quickly."""
    phases = {"all": {"train": "all", "steps": 4, "lr": 0.05}}
    recipe = write_recipe(tmp_path, phases=phases, checkpoint={"every_steps": 1}, model={"name": model})
    monkeypatch.setattr(verify_resume, "Ranks", lambda words, variables, *, world, log: Ranks(start(words, cwd=tmp_path, world=world, env=variables)))
    return verify_resume.run(["--config", str(recipe), "--kills", "1", *options])


def test_the_command_says_that_a_recipe_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, monkeypatch, "--folder", str(tmp_path / "kept")) == 0
    assert "the same: weights bit for bit" in capsys.readouterr().out
    assert (tmp_path / "kept/reference/runs/run/status.json").exists()
    with pytest.raises(UserError, match="exists already"):
        verify(tmp_path, monkeypatch, "--folder", str(tmp_path / "kept"))


def test_the_command_finds_a_network_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path, monkeypatch, model="obstacles:unrepeatable") == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_the_command_tells_a_mistake_in_the_recipe_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"phases\.all\.lrr"):
        verify(tmp_path, monkeypatch, "--phases.all.lrr", "1")
