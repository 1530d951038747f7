"""Networks and weights of the Hugging Face hub, by timm's own names: out of a cache as the hub's client leaves it, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from harness import status
from recipes import write_recipe

import dtl
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.errors import UserError
from dtl.models.build import build

NAME = "timm/hf-hub:someone/tiny-birds"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds someone/tiny-birds, a narrow ResNet of 3 birds with a normalisation of its own."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    repository = home / "hub/models--someone--tiny-birds"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    torch.manual_seed(1)
    network = timm.create_model("resnet10t", num_classes=3, stem_width=8, channels=[16, 16, 16, 32])
    facts = {"input_size": [3, 40, 40], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "crop_pct": 0.9}
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "num_features": network.num_features,
        "model_args": {"stem_width": 8, "channels": [16, 16, 16, 32]},
        "pretrained_cfg": {**facts, "num_classes": 3, "first_conv": "conv1.0", "classifier": "fc", "label_names": ["jay", "owl", "wren"]},
    }
    (snapshot / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file(network.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("dtl.models.hub._answers", lambda endpoint: False)
    return snapshot


def test_a_name_of_the_hub_brings_architecture_options_and_preprocessing(hub: Path) -> None:
    network = build(NAME, num_classes=5, own=True)
    assert (network.name, network.num_outputs, network.heads) == ("timm/resnet10t", 5, ("fc",))
    assert network.options == {"stem_width": 8, "channels": [16, 16, 16, 32]}
    facts = network.preprocessing
    assert (facts.mean, facts.image_size, facts.interpolation, facts.crop_ratio) == ((0.1, 0.2, 0.3), 40, "bicubic", 0.9)
    weights = read_weights("hf-hub:someone/tiny-birds")
    assert weights.facts["classes"] == ["jay", "owl", "wren"]
    assert weights.facts["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert {name: value.shape for name, value in network.module.state_dict().items() if not name.startswith("fc.")} == {
        name: value.shape for name, value in weights.tensors.items() if not name.startswith("fc.")
    }


def test_a_repository_has_no_say_in_what_else_is_loaded(hub: Path) -> None:
    config = json.loads((hub / "config.json").read_text())
    config["model_args"] |= {"checkpoint_path": str(hub / "nothing.pth"), "pretrained": True}
    (hub / "config.json").write_text(json.dumps(config))
    assert build(NAME, num_classes=5, own=True).options == {"stem_width": 8, "channels": [16, 16, 16, 32]}


def test_a_run_by_such_a_name_is_used_without_the_hub_afterwards(hub: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"name": NAME}, phases={"head": {"train": "head", "steps": 2, "lr": 0.1}}, transfer={"source": "pretrained"})
    # In a process of its own: older packages import huggingface_hub in the server of tests/harness.py, and it reads its variables when it is imported.
    offline = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "dtl", "train", "--config", str(recipe)], cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "timm:hf-hub:someone/tiny-birds" in done.stderr
    assert status(tmp_path / "runs/tiny")["state"] == "done"
    facts = json.loads((tmp_path / "runs/tiny/model/model.json").read_text())
    assert facts["architecture"] == {"name": "timm/resnet10t", "num_classes": 10, "options": {"stem_width": 8, "channels": [16, 16, 16, 32]}}
    assert facts["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    shutil.rmtree(tmp_path / "hf")
    numbers = dtl.evaluate(tmp_path / "runs/tiny/model", "digits", workers=0, device="cpu")
    assert numbers["top1"] == pytest.approx(status(tmp_path / "runs/tiny")["phases"][-1]["val"]["top1"])


def test_what_the_hub_does_not_hold_is_one_line_at_once(hub: Path) -> None:
    started = time.monotonic()
    for call in (lambda: build("hf-hub:nobody/nothing", num_classes=2, own=True), lambda: read_weights("timm:hf-hub:nobody/nothing")):
        with pytest.raises(UserError, match=r"cannot download nobody/nothing: the hub cannot be reached, .*`hf download nobody/nothing`"):
            call()
    with pytest.raises(UserError, match=r"cannot download timm/resnet18.*`hf download timm/resnet18"):
        read_weights("timm:resnet18")
    with pytest.raises(UserError, match=r"cannot download nobody/nothing@v2: .*`hf download nobody/nothing --revision v2`"):
        build("hf-hub:nobody/nothing@v2", num_classes=2, own=True)
    assert time.monotonic() - started < 10
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "architecture": "resnet_of_tomorrow"}))
    with pytest.raises(UserError, match="is a 'resnet_of_tomorrow', which the installed timm does not have: pip install -U timm"):
        build(NAME, num_classes=2, own=True)
    # What is in the cache, but cannot be used, is not told as missing.
    (hub / "config.json").write_text(json.dumps({**config, "num_classes": 4}))
    with pytest.raises(UserError, match=r"cannot use someone/tiny-birds: RuntimeError: .*size mismatch"):
        read_weights("hf-hub:someone/tiny-birds")
