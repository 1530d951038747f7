"""The commands in the headers of recipes for CIFAR-10 and 102 flowers, on a few images in those sets' true layouts."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path

import harness
import networks
import numpy as np
import pytest
import torch
import yaml
from recipes import write_images

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FLOWERS = {"1": "pink primrose", "2": "hard-leaved pocket orchid", "10": "globe thistle", "102": "blackberry lily"}


def header_commands(name: str) -> list[list[str]]:
    comment = "\n".join(line[1:].strip() for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    return [shlex.split(line)[3:] for line in comment.replace("\\\n", " ").splitlines() if line.startswith("accelerate launch dtl/train.py")]


def cifar(folder: Path) -> None:
    """cifar-10-batches-py as its tar has it; 20 of the test images as a folder, and a list of few training images."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {
            "batch_label": name,
            "labels": [number % 10 for number in range(20)],
            "data": generator.integers(0, 256, (20, 3072), np.uint8),
            "filenames": [f"{CIFAR[number % 10]}_s_{number:06d}.png" for number in range(20)],
        }
        (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"num_cases_per_batch": 20, "label_names": list(CIFAR), "num_vis": 3072}
    (batches / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    (batches / "readme.html").write_text("<meta>")
    write_images(folder / "cifar/train", dict.fromkeys(CIFAR, 2))
    write_images(folder / "cifar/test", dict.fromkeys(CIFAR, 2), seed=1)
    (folder / "few.csv").write_text("path,label\n" + "".join(f"cifar/train/{name}/{n}.jpg,{name}\n" for name in CIFAR for n in (0, 1)))


def flowers(folder: Path) -> None:
    for seed, (split, count) in enumerate((("train", 4), ("valid", 2), ("test", 2))):
        write_images(folder / "flowers" / split, dict.fromkeys(FLOWERS, count), seed=seed)
    (folder / "flowers/cat_to_name.json").write_text(json.dumps({**FLOWERS, "7": "moon orchid"}))


def short(words: list[str], folder: Path) -> list[str]:
    """The same command with a small network, small images and one step a phase."""
    file = CONFIGS / Path(words[words.index("--config") + 1]).name
    recipe = yaml.safe_load(file.read_text())
    extra = ["--config", str(file), "--model.name", "networks:small", "--data.image-size", "16", "--data.workers", "0", "--precision", "no"]
    for name in recipe["phases"]:
        extra += [f"--phases.{name}.steps", "1"]
    if "transfer" in recipe:
        torch.save(networks.small(num_classes=7).state_dict(), folder / "weights.pt")
        extra += ["--transfer.source", str(folder / "weights.pt")]
    at = words.index("--config")
    return [*words[:at], *words[at + 2 :], *extra, "--tracking.wandb", "off", "--tracking.report", "false"]


@pytest.mark.parametrize("name", ["cifar10_features", "cifar10_finetune", "rotnet_cifar10", "rotnet_pretext", "supervised_cifar10"])
def test_cifar10_recipes_run_on_its_batches(tmp_path: Path, name: str) -> None:
    cifar(tmp_path)
    commands = header_commands(name)
    assert commands
    for words in commands:
        harness.run(short(words, tmp_path), cwd=tmp_path)
    config = yaml.safe_load((tmp_path / f"runs/{name}/config.yaml").read_text())
    assert config["data"]["train"] == "cifar-10-batches-py"
    if name == "rotnet_pretext":
        assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == ["few-rotnet", "few-scratch", name]
        report = json.loads((tmp_path / "runs/few-rotnet/transfer.json").read_text())
        assert report["coverage"] == 1.0
        assert not (tmp_path / "runs/few-scratch/transfer.json").exists()
    else:
        model = json.loads((tmp_path / f"runs/{name}/model/model.json").read_text())
        assert model["classes"] == list(CIFAR)
        assert model["metrics"]["num_samples"] == 20


@pytest.mark.parametrize("name", ["flowers102", "flowers102_two_phase"])
def test_flowers_recipes_run_on_numbered_folders(tmp_path: Path, name: str) -> None:
    flowers(tmp_path)
    (words,) = header_commands(name)
    harness.run(short(words, tmp_path), cwd=tmp_path)
    model = json.loads((tmp_path / f"runs/{name}/model/model.json").read_text())
    assert model["classes"] == ["1", "10", "102", "2"]
    assert model["display_names"] == FLOWERS
    assert model["metrics"]["num_samples"] == 8
    assert [row["phase"] for row in json.loads((tmp_path / f"runs/{name}/status.json").read_text())["phases"]] == ["head", "all"]
