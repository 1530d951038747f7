"""Model folders: whole, self-explaining, readable by others, and clear about what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_models import FACTS, network, save

import dtl
from dtl.checkpoint.resume.model_folder import load_model_tensors
from dtl.errors import UserError
from dtl.models.model_json import read_model_json


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    net, folder = network(), tmp_path / "runs" / "model"
    save(folder, net)
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]
    assert os.listdir(tmp_path / "runs") == ["model"]
    facts = read_model_json(folder)
    assert facts.architecture == FACTS["architecture"]
    assert facts.classes == ("ants", "bees")
    assert facts.display_names == {"ants": "Ameisen"}
    assert facts.preprocessing == FACTS["preprocessing"] | {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.1, 0.1]}
    assert facts.metrics == {"top1": 0.9375}
    assert facts.made_by == {"run": "digits", "step": 120, "dtl": dtl.__version__, "torch": torch.__version__}
    state = net.state_dict()
    tensors = load_model_tensors(folder)
    assert list(tensors) == list(facts.order) == list(state)
    assert all(torch.equal(tensors[name], state[name]) and tensors[name].dtype == state[name].dtype for name in state)


def test_others_can_read_it_without_dtl(tmp_path: Path) -> None:
    net, other = network(), network()
    save(tmp_path / "model", net)
    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    assert torch.equal(other[0].weight, net[0].weight)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["format"] == 1


def test_killed_between_the_renames_the_old_one_is_found(tmp_path: Path) -> None:
    save(tmp_path / "model", metrics={"top1": 0.5})
    os.rename(tmp_path / "model", tmp_path / ".model.before")
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.5}
    assert len(load_model_tensors(tmp_path / "model")) == 11
    save(tmp_path / "model", metrics={"top1": 0.75})
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.75}
    assert os.listdir(tmp_path) == ["model"]


def change(folder: Path, **changes: object) -> None:
    value = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps({key: item for key, item in value.items() if item != "drop"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 7}, r"model.json: format: 7, this dtl knows up to 1: update dtl"),
        ({"format": "drop"}, r"model.json: format is missing"),
        ({"classes": "drop"}, r"model.json: classes is missing"),
        ({"classes": "ants"}, r"model.json: classes: must be a list"),
        ({"classes": ["ants", 3]}, r"model.json: classes.1: must be a string"),
        ({"classes": ["ants", "be\0es"]}, r"model.json: classes.1: holds a NUL character"),
        ({"preprocessing": {"mean": [1, 2, 3]}}, "preprocessing: std is missing"),
        ({"preprocessing": FACTS["preprocessing"] | {"image_size": 10**9}}, "preprocessing: image_size 1000000000 is not from 1 to 16384"),
        ({"preprocessing": FACTS["preprocessing"] | {"mean": "abc"}}, "preprocessing: mean must be three numbers"),
        ({"architecture": {"name": 3, "num_classes": 2}}, "architecture: must have a name and a positive num_classes"),
        ({"weights": {"bytes": 1, "sha256": "../x"}}, r"weights.sha256: '../x' is not a SHA-256"),
        ({"made_by": {"step": 10**400}}, r"made_by: 1000.* is too large a number"),
        ({"classes": ["ants"]}, "torchvision/resnet18 has 2 outputs, but 1 class listed"),
        ({"metrics": 3}, r"model.json: metrics: must be an object"),
        ({"order": ["0.weight"]}, r"does not match model.json: .* is in only one of them"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save(tmp_path / "model")
    change(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        load_model_tensors(tmp_path / "model")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is not a model folder: .*nothing/model.json cannot be read \(No such file or directory\)"):
        read_model_json(tmp_path / "nothing")
    save(tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"the weights .*model.safetensors are damaged"):
        load_model_tensors(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the weights .*model.safetensors cannot be read: No such file"):
        load_model_tensors(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model.json: not valid JSON"):
        read_model_json(tmp_path / "model")


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(ValueError, match="2 outputs, but 1 class name given"):
        save(Path("unused"), classes=["ants"])
    with pytest.raises(ValueError, match="preprocessing lacks std"):
        save(Path("unused"), preprocessing={"mean": 1, "image_size": 2, "interpolation": 3, "crop_ratio": 4})
