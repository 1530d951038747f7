"""A head trained on cached features is the head trained on images: to float tolerance, at any world size, resumed or not."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import history, run, start, wait_for
from recipes import weights_hash, write_recipe
from safetensors.numpy import load_file

HEAD = {"train": "head", "epochs": 3, "lr": 0.05, "weight_decay": 0.001}
PLAIN: dict[str, Any] = {"preset": "none", "erasing": 0.0}


def recipe(folder: Path, name: str, augment: dict[str, Any] | None = None, model: str = "networks:small", **head: Any) -> list[str]:
    augment = PLAIN if augment is None else augment
    file = write_recipe(
        folder, name, data={"augment": augment, "workers": 0}, model={"name": model}, phases={"head": {**HEAD, **head}}, checkpoint={"every_steps": 8}
    )
    return ["--config", str(file)]


def equal_to_tolerance(a: Path, b: Path) -> None:
    for old, new in zip(history(a), history(b), strict=True):
        assert {**old, "loss": 0} == {**new, "loss": 0}
        if "loss" in old:
            assert old["loss"] == pytest.approx(new["loss"], rel=1e-4)
    one, other = (load_file(run / "model/model.safetensors") for run in (a, b))
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("augment", ["none", "views"])
def test_equal_to_the_uncached_phase(tmp_path: Path, world: int, augment: str) -> None:
    """Without augmentation, and with as many views as epochs: the very pixels that the uncached phase sees."""
    more: dict[str, Any] = {} if augment == "none" else {"augment": {"preset": "light", "rotation": 10}, "views": 3}
    out = run([*recipe(tmp_path, "cached", cache_features=True, **more)], cwd=tmp_path, world=world)
    run([*recipe(tmp_path, "plain", cache_features=False, **more)], cwd=tmp_path, world=world)
    assert "computed once in" in out.err(0)
    equal_to_tolerance(tmp_path / "runs/cached", tmp_path / "runs/plain")
    again = run([*recipe(tmp_path, "again", cache_features="auto", **more)], cwd=tmp_path, world=world)
    assert ("cached features are read from" in again.err(0)) == (augment == "none"), "auto: no gain where each view is seen once"
    if augment == "none":
        assert weights_hash(tmp_path / "runs/again") == weights_hash(tmp_path / "runs/cached")


def test_dropout_stays_with_the_head_and_a_stop_goes_on_exactly(tmp_path: Path) -> None:
    arguments = recipe(tmp_path, "whole", model="networks:with_dropout", epochs=30)
    assert "computed once in" in run(arguments, cwd=tmp_path).err()
    stopped = recipe(tmp_path, "stopped", model="networks:with_dropout", epochs=30)
    job = start(stopped, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "runs/stopped/checkpoints/step-00000016").is_dir(), what="a checkpoint")
    job.kill(number=signal.SIGKILL)
    run(stopped, cwd=tmp_path)
    assert weights_hash(tmp_path / "runs/stopped") == weights_hash(tmp_path / "runs/whole")
    assert history(tmp_path / "runs/stopped") == history(tmp_path / "runs/whole")


def test_what_cannot_be_cached_is_told_or_refused(tmp_path: Path) -> None:
    augmented = run(recipe(tmp_path, "augmented", augment={"preset": "light"}), cwd=tmp_path)
    assert "features are computed each epoch, since images are augmented at random; phases.head.views 4" in augmented.err()
    for name, why, more in [
        ("everything", "more than the head is trained", {"train": "all"}),
        ("mixed", "mixup and cutmix mix images", {"mixup": 0.2}),
        ("turned", "the task rotate changes the images", {"task": "rotate"}),
    ]:
        job = run(recipe(tmp_path, name, cache_features=True, **more), cwd=tmp_path, code=2)
        lines = [line for line in job.err().splitlines() if not line.startswith("each process computes with")]  # where threads are few
        assert [line.partition(" ")[0] for line in lines[1:3]] == ["preprocessing:", "evaluation"]
        assert lines[3:] == [f"dtl: phases.head.cache_features is true, but {why}"]


def test_ranks_and_nodes_write_the_same_features(tmp_path: Path) -> None:
    """Each rank writes its own rows; nodes of their own (here with a cache each) get those of the others."""
    found: dict[str, str] = {}
    for name, world, others in (("one", 1, []), ("two", 2, []), ("nodes", 4, [2])):
        place = tmp_path / name
        place.mkdir()
        by_rank = {rank: {"arguments": ["--data.cache-dir", str(place / f"cache-{max([0, *(o for o in others if o <= rank)])}")]} for rank in range(world)}
        for rank in others:
            by_rank[rank]["before"] = "packing_hooks:another_node"  # type: ignore[assignment]
        job = run(recipe(place, "a"), cwd=place, world=world, by_rank=by_rank)
        assert job.err().count("computed once in") == 1
        files = sorted(place.glob("cache-*/features/*/*.npy"))
        assert len(files) == 2 * (1 + len(others))
        for file in files:
            found.setdefault(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
            assert hashlib.sha256(file.read_bytes()).hexdigest() == found[file.name], (name, file)
        assert not list(place.glob("cache-*/features/.*"))
