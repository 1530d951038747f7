"""What is exported is checked first: on real images, and nothing stays where it differs or cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import model_folder, write_image

from dtl.errors import UserError
from dtl.inference import export as module
from dtl.inference.export import NUM_CHECKED, export, need, real_images
from dtl.inference.images import find_images
from dtl.inference.model import StoredModel, open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    return open_model(model_folder(tmp_path_factory.mktemp("model") / "model"))


def test_at_most_eight_readable_images_are_taken(model: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    paths = [tmp_path / "broken.jpg", *(write_image(tmp_path / f"{number}.jpg", number) for number in range(10))]
    images = real_images(model, find_images([str(path) for path in paths]))
    assert images.shape == (NUM_CHECKED, 3, 16, 16)
    assert torch.equal(images[:1], real_images(model, find_images([str(paths[1])])))
    assert real_images(model, None).shape == images.shape, "the built-in digits"
    with pytest.raises(UserError, match=r"none of the images for the check can be read \(.*broken\.jpg: "):
        real_images(model, find_images([str(paths[0])]))


def test_what_was_written_and_how_far_it_is_off(model: StoredModel, tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    exported = export(model, target, to="safetensors", images=real_images(model, None))
    assert (exported.path, exported.num_images) == (target, NUM_CHECKED)
    assert exported.difference == pytest.approx(0.0, abs=1e-6)
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m.safetensors", "m.safetensors.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[:, :2], r"gives logits of shape \(8, 2\), PyTorch of \(8, 3\)"),
        (lambda logits: logits * np.nan, "gives logits that are not finite"),
        (lambda logits: logits + (0.5 if len(logits) == 1 else 0.0), r"differs from PyTorch by 0\.5 "),
        (lambda logits: 1 // 0, "file does not run: integer division or modulo by zero"),
    ],
)
def test_a_file_that_computes_something_else_is_not_kept(
    model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    def run_of(network: Any) -> Any:
        return lambda images: change(network(images).detach().numpy())

    monkeypatch.setattr(module, "_torch_run", run_of)
    with pytest.raises(UserError, match=message + ".*; nothing was written$"):
        export(model, tmp_path / "m.safetensors", to="safetensors", images=real_images(model, None))
    assert not list(tmp_path.glob("*m.safe*"))


def test_a_folder_that_cannot_be_written_is_one_line(model: StoredModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/m\.safetensors cannot be written: " + os.strerror(2)):
        export(model, tmp_path / "no/m.safetensors", to="safetensors", images=real_images(model, None))


def test_packages_that_are_missing_are_named() -> None:
    need("json")
    with pytest.raises(UserError, match=r"^--to onnx needs no_such_package, not installed here: pip install no_such_package$"):
        need("json", "no_such_package")
