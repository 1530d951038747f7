"""A real fine-tune: ants and bees, MobileNetV2, ImageNet weights whose names changed, loaded by order; on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run, status

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_ants_and_bees_by_order(tmp_path: Path, world: int, real_images: Path, imagenet_weights: Path) -> None:
    arguments = ["--config", str(ROOT / "configs/transfer_by_order.yaml"), "--data.train", f"{real_images}/hymenoptera_data"]
    short = ["--phases.head.epochs", "2", "--phases.all.epochs", "0.5", "--data.image-size", "160", "--tracking.report", "false", "--tracking.wandb", "off"]
    run([*arguments, "--transfer.source", str(imagenet_weights), *short], cwd=tmp_path, world=world, timeout=900)
    folder = tmp_path / "runs/transfer_by_order"
    result = status(folder)["phases"]
    assert [phase["phase"] for phase in result] == ["head", "all"]
    assert all(phase["val"]["num_samples"] == 153 for phase in result)
    assert result[0]["val"]["top1"] >= 0.90, "about 0.6 would mean that the weights did not load"
    assert result[1]["val"]["top1"] >= 0.92
    report = json.loads((folder / "transfer.json").read_text())
    assert report["coverage"] == 1.0
