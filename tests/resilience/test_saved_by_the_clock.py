"""Settings that only a run shows: checkpoint.every_minutes, and a phase that ends for want of patience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import history, run, status
from recipes import write_recipe


def trained(folder: Path, *, world: int = 1, checkpoint: dict[str, Any], **phase: Any) -> Path:
    phases = {"all": {"train": "all", "steps": 8, "lr": 0.05, "eval_every": 100, **phase}}
    recipe = write_recipe(folder, phases=phases, data={"workers": 0}, checkpoint={"every_steps": None, "keep": 20, "keep_done": 20, **checkpoint})
    run(["--config", str(recipe)], cwd=folder, world=world)
    return folder / "runs/tiny"


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_is_due_when_the_last_is_so_many_minutes_ago(tmp_path: Path, world: int) -> None:
    """A time shorter than any step; the ranks agree on it a step ahead, so that the first may have none."""
    assert set(saved(trained(tmp_path, world=world, checkpoint={"every_minutes": 1e-6}))) >= {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("minutes", [None, 60.0])
def test_no_save_before_its_time(tmp_path: Path, minutes: float | None) -> None:
    assert saved(trained(tmp_path, checkpoint={"every_minutes": minutes})) == [8]


@pytest.mark.parametrize("world", [1, 2])
def test_patience_ends_a_phase_and_says_so(tmp_path: Path, world: int) -> None:
    """At a learning rate of 0 no evaluation is better than the first."""
    stop = {"lr": 0.0, "steps": 60, "eval_every": 0.25, "early_stop": {"patience": 2}}
    folder = trained(tmp_path, world=world, checkpoint={"monitor": "top1"}, **stop)
    values = [event["top1"] for event in history(folder) if event["event"] == "val"]
    first_of_best = values.index(max(values))
    assert len(values) == first_of_best + 3 < 20
    told = [(event["step"], event["why"]) for event in history(folder) if event.get("note") == "early stop"]
    assert told == [(3 * len(values), "no better top1 in 2 evaluations")]
    assert (status(folder)["state"], status(folder)["step"]) == ("done", 3 * len(values))
    assert saved(folder)[-1] == 3 * len(values)
