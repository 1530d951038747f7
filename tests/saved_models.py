"""A small network and its model folder, with all that model.json may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dtl.checkpoint.resume.model_folder import save_model_folder

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
