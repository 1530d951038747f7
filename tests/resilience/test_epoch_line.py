"""Each epoch tells how many samples it should have and how many were trained on, also where it was stopped, made longer or damaged."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import damage
import pytest
from harness import history, run, start, steps_done, wait_for
from recipes import write_recipe

from dtl.data.packing.pack import pack

N = 1437  # digits, training
PHASES = {"head": {"train": "head", "epochs": 0.5, "lr": 0.1}, "all": {"train": "all", "epochs": 2.5, "lr": 0.05, "eval_every": 5}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", folder, shard_bytes=600_000, processes=1, progress=False)
    return folder


def recipe(folder: Path, digits: Path, **sections: Any) -> list[str]:
    return ["--config", str(write_recipe(folder, phases=sections.pop("phases", PHASES), **sections)), "--data.train", str(digits)]


def epochs(folder: Path) -> list[tuple[str, int, int, int, int]]:
    names = ("phase", "epoch", "expected", "seen", "damaged")
    return [tuple(event[name] for name in names) for event in history(folder / "runs/tiny") if event["event"] == "epoch"]  # type: ignore[misc]


WHOLE = [("head", 0, 718, 718, 0), ("all", 1, N, N, 0), ("all", 2, N, N, 0), ("all", 3, 718, 718, 0)]


@pytest.mark.parametrize("when", [2, 16])
def test_counted_on_after_a_stop_on_another_number_of_ranks(tmp_path: Path, packed: Path, when: int) -> None:
    """12 steps an epoch: stopped in the first phase, and in the middle of epochs."""
    arguments, hold = recipe(tmp_path, packed, model={"name": "paced:small"}), tmp_path / "hold"
    hold.touch()
    job = start(arguments, cwd=tmp_path, world=2, env={"HOLD": str(hold), "QUICK_STEPS": str(when + 4)})  # 4: two phases' trials for memory
    wait_for(lambda: steps_done(tmp_path / "runs/tiny") >= when, what=f"step {when}")
    job.kill(rank=1, number=signal.SIGTERM)
    hold.unlink()
    lines = job.wait().check(75).err(0)
    lines += run(arguments, cwd=tmp_path, world=1, env={"HOLD": str(hold)}).err()
    assert epochs(tmp_path) == WHOLE
    assert f"all  epoch 2  step 30  {N:,} of {N:,} samples seen, " in lines
    assert "not exact" not in lines


def test_a_phase_that_is_made_longer(tmp_path: Path, packed: Path) -> None:
    for duration in (0.5, 1.5):
        run(recipe(tmp_path, packed, phases={"all": {"train": "all", "epochs": duration, "lr": 0.05}}), cwd=tmp_path)
    assert epochs(tmp_path) == [("all", 0, 718, 718, 0), ("all", 0, N, N, 0), ("all", 1, 718, 718, 0)]


def test_damage_and_an_early_end(tmp_path: Path, packed: Path) -> None:
    digits = Path(shutil.copytree(packed, tmp_path / "digits"))
    for sample in (9, 400, 1000):
        damage.flip_bit(digits / "train", sample)
    stop = {"all": {"train": "all", "epochs": 9, "lr": 0.05, "eval_every": 1.5, "early_stop": {"threshold": 0.0}}}
    job = run(recipe(tmp_path, digits, phases=stop, data={"on_error": "skip", "max_bad": 3}), cwd=tmp_path, world=2)
    first, second = epochs(tmp_path)
    assert first == ("all", 0, N, N, 3)
    assert second[:4] == ("all", 1, 718, 718)
    assert f"{N:,} of {N:,} samples seen, 3 of them damaged and masked with weight 0 (bad_samples.jsonl)" in job.err()


def test_the_training_loss_of_an_epoch_is_the_mean_over_all_its_steps(tmp_path: Path, packed: Path) -> None:
    """Over all ranks, and however the log lines fall: not the last line's, which is of a few steps, and may be another epoch's."""
    found = []
    for log_every in (1, 7):
        run([*recipe(tmp_path, packed, tracking={"log_every": log_every}), "--run.name", f"every-{log_every}"], cwd=tmp_path, world=2)
        events = history(tmp_path / f"runs/every-{log_every}")
        found.append({event["epoch"]: event["loss"] for event in events if event["event"] == "epoch"})
        steps = [event for event in events if event["event"] == "train"]
        for epoch, loss in found[0].items():
            losses = [step["loss"] for step in steps if step["epoch"] == epoch]
            assert log_every > 1 or loss == pytest.approx(sum(losses) / len(losses), rel=0.01)  # steps differ by one sample in 120
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-9)
