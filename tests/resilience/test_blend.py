"""`after: blend`: points between the weights that entered a phase and those at its end; through any kill, at any number of ranks, the same one is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import history, run, status
from PIL import Image
from recipes import weights_hash, write_recipe
from safetensors.torch import load_file

from dtl.config import PhaseConfig

HEAD = {"train": "head", "steps": 2, "lr": 0.01}
BLENDED = {"train": "all", "steps": 3, "lr": 0.3, "schedule": "constant", "after": "blend", "ema": 0.3, "eval_every": 2}


def recipe(folder: Path, images: Path, **sections: Any) -> list[str]:
    data = {"train": str(images), "val_fraction": 0.3, "global_batch_size": 40, "workers": 0, "micro_batch_size": 20}
    return ["--config", str(write_recipe(folder, **{"phases": {"head": HEAD, "all": BLENDED}, "data": data, **sections}))]


def dark_and_bright(folder: Path) -> Path:
    """Noise of two brightnesses, not all of which are told apart."""
    generator = np.random.default_rng(0)
    for name, mean in (("a", 110), ("b", 150)):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            noise = generator.normal(generator.normal(mean, 25), 40, (12, 16, 3)).clip(0, 255)
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dark_and_bright(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder, images), cwd=folder)
    return folder / "runs/tiny"


def end_of(whole: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What entered the last phase (of the tensors that it changed), and the weights at its end."""
    newest = sorted((whole / "checkpoints").glob("step-*"))[-1]
    start, model, ema = (load_file(newest / f"{group}.safetensors") for group in ("start", "model", "ema"))
    return start, model | ema


def test_nine_points_are_candidates_beside_start_and_end_and_the_kept_one_is_delivered(whole: Path) -> None:
    told = [event for event in history(whole) if event["event"] == "val" and event["phase"] == "all"]
    assert [(event["step"], event.get("entering", False), event.get("blend")) for event in told] == [
        (2, True, None), (5, False, None), *((5, False, round(0.1 * point, 1)) for point in range(1, 10)),
    ]  # fmt: skip
    row = status(whole)["phases"][-1]
    kept = [event for event in told if event["kept"]][-1]
    assert (row["blend"], row["looks"], row["train_loss"], row["kept_step"]) == (kept["blend"], 11, None, 5)
    assert row["val"] == {name: kept[name] for name in ("top1", "top5", "loss", "num_samples")}
    assert row["best"]["step"] == 5, "early stopping goes by the phase's own evaluations"
    share = row["blend"]
    assert 0 < share < 1
    start, end = end_of(whole)
    assert start.keys() == end.keys(), "the whole network was trained"
    for name, tensor in load_file(whole / "model/model.safetensors").items():
        if "running" in name:
            assert not torch.allclose(tensor, torch.lerp(start[name], end[name], share)), "estimated anew"
        else:
            expected = torch.lerp(start[name], end[name], share) if tensor.is_floating_point() else end[name]
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("where", ["in_a_blend", "stopped_in_a_blend", "stopped_between_points"])
def test_killed_there_it_ends_the_same_at_any_number_of_ranks(tmp_path: Path, whole: Path, images: Path, where: str) -> None:
    run(recipe(tmp_path, images), cwd=tmp_path, by_rank={0: {"before": f"kill_hooks:{where}"}}, code=75 if "stopped" in where else -9)
    folder = tmp_path / "runs/tiny"
    copies = {world: tmp_path / f"{world}" for world in (2, 3)} if where == "in_a_blend" else {}
    for copy in copies.values():
        shutil.copytree(folder, copy / "runs/tiny")
    run(recipe(tmp_path, images), cwd=tmp_path)
    assert history(folder) == history(whole)
    assert weights_hash(folder) == weights_hash(whole)
    for world, copy in copies.items():
        run(recipe(copy, images), cwd=copy, world=world)
        assert weights_hash(copy / "runs/tiny") == weights_hash(whole)
        assert status(copy / "runs/tiny")["phases"][-1]["blend"] == status(whole)["phases"][-1]["blend"]


def test_more_epochs_go_on_from_the_end_and_statistics_that_did_not_move_are_the_same_at_every_point(tmp_path: Path, images: Path) -> None:
    frozen = {**BLENDED, "norm_statistics": "frozen"}
    sections: dict[str, Any] = {"phases": {"head": HEAD, "all": {**frozen, "steps": 2}}}
    run(recipe(tmp_path, images, **sections), cwd=tmp_path)
    folder = tmp_path / "runs/tiny"
    first = load_file(folder / "model/model.safetensors")
    start, _ = end_of(folder)
    assert not any("running" in name for name in start), "a checkpoint holds what the phase may change"
    # Of a network from scratch, whose norms were frozen in both phases; a moving average leaves them alone, too.
    assert all(bool((tensor == float(name.endswith("var"))).all()) for name, tensor in first.items() if "running" in name)
    sections["phases"]["all"]["steps"] = 3
    run(recipe(tmp_path, images, **sections), cwd=tmp_path)
    assert status(folder)["phases"][-1]["looks"] == 1 + 2 + 9
    whole = tmp_path / "whole"
    whole.mkdir()
    run(recipe(whole, images, phases={"head": HEAD, "all": frozen}), cwd=whole)
    longer = load_file(folder / "model/model.safetensors")
    assert {name: tensor for name, tensor in longer.items() if "running" in name and not torch.equal(tensor, first[name])} == {}
    start, end = end_of(folder)
    other_start, other_end = end_of(whole / "runs/tiny")
    assert all(torch.equal(tensor, other_start[name]) for name, tensor in start.items())
    assert all(torch.equal(tensor, other_end[name]) for name, tensor in end.items()), "the blend changed nothing of what is trained on"


def test_a_blend_of_different_networks_is_refused_in_one_line(tmp_path: Path, images: Path) -> None:
    """And what the line says to do is possible: `whole` does it."""
    pretext = {"pretext": {"task": "rotate", "train": "all", "steps": 1}, "all": BLENDED}
    for phases, more in (({"all": BLENDED}, []), (pretext, ["--dry-run"])):
        job = run([*recipe(tmp_path, images, phases=phases), *more], cwd=tmp_path, code=2)
        (line,) = [line for line in job.err().splitlines() if "after is blend" in line]
        assert "phases.all.after is blend, but the phase begins with a new head" in line
        assert "train the head in a phase before it (`head: {train: head}`), or leave `after` out" in line


def test_settings_that_do_not_go_with_a_blend() -> None:
    with pytest.raises(ValueError, match="`after: blend` chooses by `keep: one_se`, not by `keep: last`; leave out one of them"):
        PhaseConfig(after="blend", keep="last")
    with pytest.raises(ValueError, match="`optimizer: solve` has no use for after"):
        PhaseConfig(train="head", optimizer="solve", after="blend")
