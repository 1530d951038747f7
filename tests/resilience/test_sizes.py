"""`phases.NAME.image_size`: each phase at its own size, killed in each of them or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import history, run, start, status
from recipes import weights_hash, write_images, write_recipe
from safetensors.torch import load_file

from dtl import load_pretrained
from dtl.models.build import build

PHASES = {
    "pretext": {"task": "rotate", "train": "all", "steps": 4, "lr": 0.05, "image_size": 12},
    "small": {"train": "head", "steps": 4, "lr": 0.1, "cache_features": True},
    "oblong": {"train": "head", "steps": 4, "lr": 0.1, "cache_features": True, "image_size": [12, 20]},
    "large": {"train": "all", "steps": 6, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "eval_every": 0.3, "image_size": 24},
}


# Of large images not the whole batch of 120 fits into memory.
HUNGRY = {"name": "networks:hungry", "options": {"fits": 40, "from_side": 24}}


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_killed_in_each_phase_it_ends_as_if_nothing_had_happened(tmp_path: Path, world: int) -> None:
    hooks = {rank: {"before": "kill_hooks:at_a_step"} for rank in range(world)}
    arguments = [["--config", str(write_recipe(tmp_path, name, phases=PHASES, model=HUNGRY, checkpoint={"every_steps": 3}))] for name in ("whole", "killed")]
    dry = run([*arguments[0], "--dry-run"], cwd=tmp_path)
    job = run(arguments[0], cwd=tmp_path, world=world)
    for step in (2, 7, 11, 17):
        killed = start(arguments[1], cwd=tmp_path, world=world, env={"KILL_AT": str(step)}, by_rank=hooks)
        assert killed.wait().codes == [-9] * world, killed.err()
    run(arguments[1], cwd=tmp_path, world=world)
    whole, killed_run = tmp_path / "runs/whole", tmp_path / "runs/killed"
    assert status(killed_run)["state"] == "done"
    assert weights_hash(killed_run) == weights_hash(whole)
    assert history(killed_run) == history(whole)
    facts = json.loads((killed_run / "model/model.json").read_text())
    assert facts["preprocessing"]["image_size"] == facts["preprocessing"]["transform"]["geometry"]["image_size"] == 24
    assert facts["made_by"]["preprocessing"]["image_size"] == "phases.large.image_size"
    for name, size in (("pretext", "12"), ("small", "16"), ("oblong", "[12, 20]"), ("large", "24")):
        for said in (dry, job):
            assert f", images of {size} pixels, " in next(line for line in said.err(0).splitlines() if line.startswith(f"phase {name}: ") and "epoch" in line)
    assert "phase large: micro-batches of 30 fit, " in job.err(0), "fitted anew"
    assert job.err(0).count("micro-batches of") == 1
    assert job.err(0).count(" computed once in ") == 2, "features of each size are others"
    again = run(["runs/killed", "--json", "again.json"], cwd=tmp_path, command="evaluate")
    assert again.codes == [0]
    top1 = json.loads((tmp_path / "again.json").read_text())["top1"]
    assert top1 == status(killed_run)["phases"][-1]["val"]["top1"], "evaluated at the size of the last phase"


@pytest.mark.soak
def test_dinov2_trains_at_224_from_weights_of_518(tmp_path: Path) -> None:
    """configs/dinov2.yaml, with random values in place of Meta's; the table is resized as timm resizes it, and the model predicts."""
    from timm.layers import resample_abs_pos_embed

    torch.manual_seed(0)
    source = {name: value for name, value in build("timm/vit_small_patch14_dinov2", num_classes=2).module.state_dict().items() if not name.startswith("head.")}
    source["pos_embed"] = torch.randn(1, 1 + 37**2, 384) / 50
    torch.save({**source, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    images = write_images(tmp_path / "photos", {"ant": 12, "bee": 12})
    config = Path(__file__).resolve().parents[2] / "configs/dinov2.yaml"
    arguments = ["--config", str(config), "--data.train", str(images), "--transfer.source", "dinov2_vits14_pretrain.pth", "--data.val_fraction", "0.4"]
    arguments += ["--data.global_batch_size", "4", "--phases.all.epochs", "1", "--phases.all.warmup", "0", "--tracking.wandb", "off"]
    job = run([*arguments, "--model.pool", "token+avg", "--phases.all.keep", "last", "--tracking.log_every", "1"], cwd=tmp_path, timeout=600)
    folder = tmp_path / "runs/dinov2"
    assert "image size 224 (data.image_size)" in job.err()
    outcomes = {outcome["target"]: outcome for outcome in json.loads((folder / "transfer.json").read_text())["outcomes"]}
    assert outcomes["pos_embed"]["transform"].startswith("resize_position_embedding")
    assert [name for name, outcome in outcomes.items() if outcome["outcome"] == "fresh"] == ["head.weight", "head.bias"]
    expected = resample_abs_pos_embed(source["pos_embed"], [16, 16], num_prefix_tokens=1)
    module = build("timm/vit_small_patch14_dinov2", num_classes=2, options={"img_size": 224}).module
    load_pretrained(module, tmp_path / "dinov2_vits14_pretrain.pth")
    torch.testing.assert_close(module.get_parameter("pos_embed"), expected, rtol=0, atol=1e-6)
    trained = load_file(folder / "model/model.safetensors")
    moved = (trained["pos_embed"] - expected).abs().max()
    assert 0 < moved < 1e-3, "some steps at small rates"
    assert trained["head.weight"].shape == (2, 768)
    losses = [event["loss"] for event in history(folder) if event["event"] == "train"]
    assert len(losses) >= 3
    assert all(0 < loss < 5 for loss in losses)
    run(["runs/dinov2", str(images / "ant/0.jpg"), "--out", "found.csv"], cwd=tmp_path, command="predict")
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 2
