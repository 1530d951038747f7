"""A model folder as a network that runs: the right weights, and the transform of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_folders import model_folder

from dtl.config import own
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
