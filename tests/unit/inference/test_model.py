"""A model folder as a network that runs: the right weights, and the transform of its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import model_folder

from dtl.data.transforms.transforms import eval_transform
from dtl.errors import UserError
from dtl.inference.model import open_model


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    text = (folder / "model.json").read_text().replace("networks:small", "networks:without_norms")
    (folder / "model.json").write_text(text)
    with pytest.raises(UserError, match="the network networks:without_norms"):
        open_model(folder)


def described(folder: Path, **changes: object) -> Path:
    """A model folder that says what evaluation did to its images, with `changes` (None: the key is not there)."""
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": 16, "interpolation": "bilinear", "crop_ratio": 0.8}
    transform = {**eval_transform(image_size=16, crop_ratio=0.8).describe(), **changes}
    return model_folder(folder, preprocessing={**facts, "transform": {key: value for key, value in transform.items() if value is not None}})


@pytest.mark.parametrize("changes", [{}, {"evaluation_version": None, "version": 1}, {"evaluation_version": None, "version": 2}, {"version": 99}])
def test_a_model_opens_whatever_its_training_did_to_the_images(tmp_path: Path, changes: dict[str, object]) -> None:
    """Folders of an older dtl have one number for both; the augmentations' version says nothing about a model that is there."""
    assert open_model(described(tmp_path / "model", **changes)).transform == eval_transform(image_size=16, crop_ratio=0.8)


def test_a_model_whose_images_were_resized_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version 2 of evaluation's transforms, this dtl has version 1; use the dtl that trained it"):
        open_model(described(tmp_path / "model", evaluation_version=2))
