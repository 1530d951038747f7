"""A model folder as a network that runs: the right weights, and the transform of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_folders import model_folder

from dtl.config import own
from dtl.config.models import Fit, ImageSize
from dtl.data.transforms.transforms import eval_transform
from dtl.errors import UserError
from dtl.inference.model import open_model
from dtl.models.build import build


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    text = (folder / "model.json").read_text().replace("networks:small", "networks:without_norms")
    (folder / "model.json").write_text(text)
    with pytest.raises(UserError, match="the network networks:without_norms"):
        open_model(folder, trust=True)


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
    with pytest.raises(UserError, match=r"version 2 of the evaluation transforms, but this dtl has version 1; use the version of dtl that trained it"):
        open_model(described(tmp_path / "model", evaluation_version=2))


@pytest.mark.parametrize("size", [16, (16, 24)])
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_a_model_sees_images_as_its_training_did(tmp_path: Path, fit: Fit, size: ImageSize) -> None:
    transform = eval_transform(image_size=size, crop_ratio=0.8, fit=fit, fill=(9, 8, 7))
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": size, "interpolation": "bilinear", "crop_ratio": 0.8}
    folder = model_folder(tmp_path / "model", preprocessing={**facts, "transform": json.loads(json.dumps(transform.describe()))})
    model = open_model(folder)
    assert model.transform == transform
    assert model.network.preprocessing.image_size == size


@pytest.mark.parametrize(
    ("geometry", "fill", "message"),
    [
        ({"name": "Fitted", "image_size": 16, "resize_size": 10**9, "padded": True, "shift": 0}, [1, 2, 3], "resize_size 1000000000 is not from 1 to 32768"),
        ({"name": "Fitted", "image_size": 16, "resize_size": 16, "padded": True, "shift": -1}, [1, 2, 3], "shift -1 is not from 0"),
        ({"name": "Fitted", "image_size": 16, "resize_size": 16, "padded": True, "shift": 0}, [1, 2, 300], r"fill \[1, 2, 300\] is no colour"),
        ({"name": "Fitted", "image_size": 16, "resize_size": 16, "padded": True, "shift": 0}, [1], "damaged"),
        ({"name": "ShortSide", "image_size": [16, 10**9], "resize_size": 16}, None, r"image_size \[16, 1000000000\] is not from 1 to 16384"),
        ({"name": "ShortSide", "image_size": [16, 16, 16], "resize_size": 16}, None, r"image_size \[16, 16, 16\] is not from"),
        ({"name": "ShortSide", "image_size": 16, "resize_size": 10**9}, None, "resize_size 1000000000 is not from 1 to 32768"),
    ],
)
def test_sizes_and_colours_of_a_strangers_folder_are_checked(tmp_path: Path, geometry: dict[str, object], fill: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_model(described(tmp_path / "model", geometry=geometry, fill=fill))


def test_a_crop_ratio_near_zero_asks_for_huge_images(tmp_path: Path) -> None:
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": 16, "interpolation": "bilinear", "crop_ratio": 1e-9}
    with pytest.raises(UserError, match="crop_ratio 1e-09 is not above 0"):
        open_model(model_folder(tmp_path / "model", preprocessing=facts))


# ---- model folders of strangers


def strangers(folder: Path, **architecture: object) -> Path:
    """A model folder whose model.json somebody else has edited."""
    model_folder(folder, name="dtl/resnet_tiny", own=False)
    facts = json.loads((folder / "model.json").read_text())
    facts["architecture"] |= architecture
    (folder / "model.json").write_text(json.dumps(facts))
    return folder


def test_a_function_is_called_only_with_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    folder = strangers(tmp_path / "model", name="os:system", options={"command": f"touch {ran}"})
    with pytest.raises(UserError, match=r"calling the function os:system\(num_classes=3, command='touch .*add --trust"):
        open_model(folder)
    assert not ran.exists()
    lines: list[str] = []
    with pytest.raises(UserError, match="returned a int"):  # it is called now
        open_model(folder, trust=True, log=lines.append)
    assert ran.exists()
    assert len(lines) == 1
    monkeypatch.setattr(own, "_noted", set())
    with pytest.raises(UserError, match="returned a int"):
        open_model(folder)  # trusted since: this function, this file
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace("touch", "rm"))
    with pytest.raises(UserError, match="add --trust"):
        open_model(folder)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "timm/hf-hub:somebody/net"}, "would be downloaded from the hub, but only a file names it"),
        ({"name": "hf-hub:somebody/net"}, "would be downloaded from the hub, but only a file names it"),
        ({"name": "../../x"}, "unknown model"),
        ({"name": "timm/resnet18", "options": {"checkpoint_path": "/etc/passwd"}}, "option checkpoint_path would load weights outside of the section"),
        ({"name": "timm/resnet18", "options": {"pretrained": True}}, "option pretrained would load weights outside of the section"),
        ({"name": "timm/resnet18", "options": {"pretrained_cfg": {"file": "x"}}}, "option pretrained_cfg would load weights outside of the section"),
        ({"name": "torchvision/resnet18", "options": {"weights": "DEFAULT"}}, "option weights would load weights outside of the section"),
        ({"name": "torchvision/resnet18", "options": {"width_per_group": 10**12}}, "the option value 1,000,000,000,000 is too large"),
        ({"name": "torchvision/resnet18", "options": {"width_per_group": 1e300}}, "the option value .* is too large"),
        ({"name": "torchvision/resnet50", "options": {"width_per_group": 16_000}}, "has more parameters than its weights"),
        ({"name": "timm/vit_tiny_patch16_224", "options": {"depth": 16_000}}, "has more modules|has more than 100,000 modules|more parameters"),
        ({"name": "timm/vit_tiny_patch16_224", "options": {"act_layer": [[[1]] * 2000]}}, "number of its options is too large"),
        ({"name": "torchvision/resnet18", "options": {"norm_layer": "os:system"}}, "cannot be built with the options"),
    ],
)
def test_networks_of_a_file_come_from_the_catalogues(tmp_path: Path, architecture: dict[str, object], message: str) -> None:
    if "timm" in str(architecture["name"]):
        pytest.importorskip("timm")
    folder = strangers(tmp_path / "model", **architecture)
    with pytest.raises(UserError, match=message) as caught:
        open_model(folder, trust="hub" in str(architecture["name"]))
    assert "\n" not in str(caught.value)


def test_options_of_a_catalogue_are_of_use(tmp_path: Path) -> None:
    """What people do change: without trust, and with the weights that fit."""
    network = build("torchvision/resnet18", num_classes=2, options={"width_per_group": 64, "zero_init_residual": True}, max_values=30_000_000)
    assert network.num_outputs == 2
