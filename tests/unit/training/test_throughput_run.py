"""An epoch's line in a real run, and the advice when its loading is slow."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest
import recipes


@pytest.mark.parametrize("world", [1, 2])
def test_each_epoch_says_how_fast_it_was(tmp_path: Path, world: int) -> None:
    recipe = recipes.write_recipe(tmp_path, phases={"all": {"train": "all", "epochs": 2, "lr": 0.05}})
    job = harness.run(["--config", str(recipe)], cwd=tmp_path, world=world)
    epochs = [event for event in harness.history(tmp_path / "runs/tiny", times=True) if event["event"] == "epoch"]
    assert len(epochs) == 2
    for event in epochs:
        assert 0 < event["images_per_second"] < 1e6
        assert 0 <= event["data_wait"] <= 1
        assert 0.05 < event["memory_gib"] < 10
        assert event["seen"] == event["expected"] == 1437
    assert "images/s, waiting for data " in job.err()
    assert " GiB" in job.err()


def test_slow_loading_is_told_with_what_to_change(tmp_path: Path) -> None:
    """Without loader processes, heavy augmentation of large pictures, and a network that does next to nothing."""
    data = {"image_size": 256, "global_batch_size": 40, "workers": 0, "augment": {"preset": "imagenet", "randaugment": [6, 15], "color_jitter": 0.4}}
    recipe = recipes.write_recipe(tmp_path, data=data, model={"name": "networks:mean_colour"}, phases={"all": {"train": "all", "steps": 14, "lr": 0.05}})
    job = harness.run(["--config", str(recipe)], cwd=tmp_path)
    said = [line for line in job.err().splitlines() if "data loading is the bottleneck" in line]
    assert len(said) == 1, job.err()
    assert "in the training process itself; --data.workers " in said[0] or "waiting for the disk (or for a free core)" in said[0]
    notes = [event for event in harness.history(tmp_path / "runs/tiny", times=True) if event.get("note") == "limit"]
    assert [note["phase"] for note in notes] == ["all"]
    assert job.err().count("data: the training process itself (") == 1
    assert job.err().index("can prepare") < job.err().index("step 14/14"), "in time to do something about it"


def test_the_time_in_which_a_device_catches_up_counts(tmp_path: Path) -> None:
    """On a GPU a step's call returns before the step is done; a log line waits for it."""
    recipe = recipes.write_recipe(tmp_path, phases={"all": {"train": "all", "steps": 8, "lr": 0.05}}, tracking={"log_every": 4}, data={"workers": 0})
    harness.run(["--config", str(recipe)], cwd=tmp_path, by_rank={0: {"before": "obstacles:far_ahead"}})
    events = harness.history(tmp_path / "runs/tiny", times=True)
    lines = [event for event in events if event["event"] == "train"]
    (epoch,) = [event for event in events if event["event"] == "epoch"]
    images = 4 * recipes.RECIPE["data"]["global_batch_size"]
    assert len(lines) == 2
    assert all(event["images_per_second"] <= images / 0.5 for event in lines)
    assert epoch["images_per_second"] <= 2 * images / 1.0


@pytest.mark.parametrize("world", [1, 2])
def test_losses_that_are_read_one_line_late_give_the_same_history_after_a_kill_too(tmp_path: Path, world: int) -> None:
    expected = tmp_path / "expected"
    expected.mkdir()
    harness.run(["--config", str(recipes.write_recipe(expected))], cwd=expected, world=world)
    recipe, late = recipes.write_recipe(tmp_path), {rank: {"before": "obstacles:reads_late"} for rank in range(world)}
    job = harness.start(["--config", str(recipe)], cwd=tmp_path, world=world, by_rank=late)
    harness.wait_for(lambda: harness.steps_done(tmp_path / "runs/tiny") >= 11 or None, what="step 11")
    job.kill()
    before = harness.history(tmp_path / "runs/tiny")
    harness.run(["--config", str(recipe)], cwd=tmp_path, world=world, by_rank=late)
    events = harness.history(tmp_path / "runs/tiny")
    assert events == harness.history(expected / "runs/tiny")
    assert [event["step"] for event in before] == sorted(event["step"] for event in before)
    assert recipes.weights_hash(tmp_path / "runs/tiny") == recipes.weights_hash(expected / "runs/tiny")


def test_a_loss_that_is_not_finite_ends_a_run_whose_lines_are_late(tmp_path: Path) -> None:
    phases = {"all": {"train": "all", "steps": 9, "lr": 0.1}}
    recipe = recipes.write_recipe(tmp_path, model={"name": "networks:diverging"}, phases=phases)
    job = harness.run(["--config", str(recipe)], cwd=tmp_path, code=2, by_rank={0: {"before": "obstacles:reads_late"}})
    assert "the loss is not finite at step 2 of phase all (lr 0.0" in job.err()
