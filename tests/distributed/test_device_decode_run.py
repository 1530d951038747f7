"""A run whose JPEGs are decoded on the device (here torchcodec's CPU decoder, where there is no GPU) learns what another run learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import history, run
from recipes import weights_hash, write_images, write_recipe

PHASES = {"all": {"train": "all", "epochs": 2, "lr": 0.05, "eval_every": 0.5}}
DATA = {"val_fraction": 0.25, "global_batch_size": 8, "augment": {"preset": "imagenet"}}


@pytest.mark.parametrize("world", [1, 2])
def test_losses_are_those_of_the_loader_processes(tmp_path: Path, world: int) -> None:
    images = write_images(tmp_path / "images", {"one": 20, "two": 24})
    for name, decode in (("workers", "workers"), ("device", "device"), ("again", "device")):
        recipe = write_recipe(tmp_path, name, data={**DATA, "train": str(images), "decode": decode}, phases=PHASES)
        run(["--config", str(recipe)], cwd=tmp_path, world=world)
    losses = {name: [line["loss"] for line in history(tmp_path / "runs" / name) if line["event"] == "val"] for name in ("workers", "device")}
    assert len(losses["device"]) == len(losses["workers"]) >= 4
    assert losses["device"] == pytest.approx(losses["workers"], rel=0.02)
    assert weights_hash(tmp_path / "runs/device") == weights_hash(tmp_path / "runs/again")


def test_what_it_cannot_do_is_one_line_before_the_first_step(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"one": 8, "two": 8})
    recipe = write_recipe(tmp_path, data={**DATA, "train": str(images), "decode": "device", "augment": {"preset": "light", "rotation": 5}}, phases=PHASES)
    done = run(["--config", str(recipe)], cwd=tmp_path, world=2, code=2)
    lines = [line for line in done.err().splitlines() if line.startswith("dtl: ")]
    assert lines == ["dtl: data.decode device supports crop, resize, flips, turns and erasing only; data.augment.rotation needs data.decode workers"]


def test_a_machine_without_the_decoder_is_named_on_all_ranks(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"one": 8, "two": 8})
    recipe = write_recipe(tmp_path, model={"name": "obstacles:uncodec"}, data={**DATA, "train": str(images), "decode": "device"}, phases=PHASES)
    done = run(["--config", str(recipe)], cwd=tmp_path, world=2, code=2)
    (line,) = [line for line in done.err().splitlines() if line.startswith("dtl: ")]
    assert line.startswith("dtl: rank 1: data.decode device needs the package torchcodec (")
