"""A file of tensors appears whole, or the one before stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dtl.checkpoint.resume import tensors_file
from dtl.checkpoint.resume.model_folder import read_model_json, save_model_folder
from dtl.errors import UserError

FACTS: dict[str, Any] = {
    "architecture": {"name": "torchvision/resnet18", "num_classes": 2, "options": {"stem": 3}},
    "classes": ["ants", "bees"],
    "display_names": {"ants": "Ameisen"},
    "preprocessing": {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.1, 0.1), "image_size": 224, "interpolation": "bicubic", "crop_ratio": 0.875},
    "metrics": {"top1": 0.9375},
    "made_by": {"run": "digits", "step": 120},
}


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[0].weight  # tied, as some networks are
    return net


def save(folder: Path, net: nn.Module | None = None, **changes: Any) -> None:
    save_model_folder(folder, (net or network()).state_dict(), **(FACTS | changes))


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", metrics={"top1": 0.5})

    def full(path: Path, value: object) -> tensors_file.FileFacts:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors_file, "write_json", full)
        with pytest.raises(UserError, match=r"could not be written to .*/model: No space left on device"):
            save(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.5}
    (tmp_path / ".writing-model-1").mkdir()  # of a killed process
    save(tmp_path / "model", metrics={"top1": 0.75})
    assert os.listdir(tmp_path) == ["model"]
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.75}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to .*/file/model: (File exists|Not a directory)"):
        save(tmp_path / "file" / "model")
