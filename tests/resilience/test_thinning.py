"""A run that is done leaves its last checkpoint and its model; killed at any moment of that it ends so at the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import history, run, start, status
from recipes import weights_hash, write_recipe

PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 12, "lr": 0.05, "ema": 0.9, "eval_every": 1}}


def recipe(folder: Path, **checkpoint: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    return ["--config", str(write_recipe(folder, phases=PHASES, checkpoint={"every_steps": 3, **checkpoint}))]


def checkpoints(folder: Path) -> list[str]:
    """With what is hidden there."""
    return sorted(path.name for path in (folder / "runs/tiny/checkpoints").iterdir())


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 18 steps, of which nothing is deleted at its end."""
    folder = tmp_path_factory.mktemp("longer")
    run([*recipe(folder, keep=9, keep_done=9), "--phases.all.steps", "12"], cwd=folder)
    assert len(checkpoints(folder)) == 4
    run([*recipe(folder, keep=9, keep_done=9), "--phases.all.steps", "18"], cwd=folder)
    assert len(checkpoints(folder)) == 6
    return folder / "runs/tiny"


def test_the_last_stays_and_the_run_can_train_longer(tmp_path: Path, longer: Path) -> None:
    run(recipe(tmp_path), cwd=tmp_path)
    assert checkpoints(tmp_path) == ["step-00000012"]
    job = run([*recipe(tmp_path), "--phases.all.steps", "18"], cwd=tmp_path)
    assert "resuming at step 12" in job.err()
    assert checkpoints(tmp_path) == ["step-00000018"]
    assert weights_hash(tmp_path / "runs/tiny") == weights_hash(longer)
    assert history(tmp_path / "runs/tiny") == history(longer)


def test_the_key_says_how_many_stay(tmp_path: Path) -> None:
    words = recipe(tmp_path)
    run([*words, "--checkpoint.keep_done", "2"], cwd=tmp_path)
    assert checkpoints(tmp_path) == ["step-00000009", "step-00000012"]
    assert "is finished (step 12)" in run(words, cwd=tmp_path).err(), "it may be changed, and another start deletes what is left"
    assert checkpoints(tmp_path) == ["step-00000012"]


@pytest.mark.parametrize(
    ("moment", "state", "left"),
    [
        ("before_the_model", "running", ["step-00000006", "step-00000009", "step-00000012"]),
        ("before_thinning", "done", ["step-00000006", "step-00000009", "step-00000012"]),
        ("in_thinning", "done", None),
    ],
)
def test_killed_at_its_end_the_next_start_ends_it(tmp_path: Path, longer: Path, moment: str, state: str, left: list[str] | None) -> None:
    words = recipe(tmp_path)
    start(words, cwd=tmp_path, by_rank={0: {"before": f"kill_hooks:{moment}"}}).wait().check(-9)
    folder = tmp_path / "runs/tiny"
    assert status(folder)["state"] == state
    if left is None:
        torn = [name for name in checkpoints(tmp_path) if name.startswith(".deleting-step-")]
        assert len(torn) == 1
        assert len(checkpoints(tmp_path)) == 2
    else:
        assert checkpoints(tmp_path) == left
    run(words, cwd=tmp_path)
    assert status(folder)["state"] == "done"
    assert checkpoints(tmp_path) == ["step-00000012"]
    run([*words, "--phases.all.steps", "18"], cwd=tmp_path)
    assert weights_hash(folder) == weights_hash(longer)


def test_killed_while_thinning_more_epochs_at_once(tmp_path: Path, longer: Path) -> None:
    words = recipe(tmp_path)
    start(words, cwd=tmp_path, by_rank={0: {"before": "kill_hooks:in_thinning"}}).wait().check(-9)
    run([*words, "--phases.all.steps", "18"], cwd=tmp_path)
    assert checkpoints(tmp_path) == ["step-00000018"]
    assert weights_hash(tmp_path / "runs/tiny") == weights_hash(longer)


def test_a_stopped_run_keeps_all_and_a_damaged_last_one_deletes_none(tmp_path: Path) -> None:
    words = recipe(tmp_path)
    run([*words, "--checkpoint.deadline_seconds", "0.01"], cwd=tmp_path, code=75)
    run([*words, "--checkpoint.keep_done", "3"], cwd=tmp_path)
    folder = tmp_path / "runs/tiny/checkpoints"
    three = checkpoints(tmp_path)
    assert len(three) == 3
    manifest = folder / three[-1] / "manifest.json"
    weights = weights_hash(tmp_path / "runs/tiny")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 7}))
    # The one before is resumed, and the last step trained and saved again: only then is there something to thin.
    run(words, cwd=tmp_path)
    assert checkpoints(tmp_path) == ["step-00000012"]
    assert weights_hash(tmp_path / "runs/tiny") == weights
