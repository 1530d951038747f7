"""model.json is read without torch, and each field is checked before it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtl.errors import UserError
from dtl.models.model_json import read_model_json

FACTS: dict[str, Any] = {
    "format": 1,
    "architecture": {"name": "torchvision/resnet18", "num_classes": 2, "options": {}},
    "classes": ["ants", "bees"],
    "display_names": {"ants": "Ameisen"},
    "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.1, 0.1], "image_size": 224, "interpolation": "bicubic", "crop_ratio": 0.875},
    "metrics": {"top1": 0.9375},
    "made_by": {"run": "digits", "step": 120},
    "order": ["fc.weight"],
    "weights": {"bytes": 8, "sha256": "0" * 64},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": True}, r"format: must be a whole number"),
        ({"format": 0}, r"format: 0, this dtl knows up to 1"),
        ({"architecture": []}, r"architecture: must be an object"),
        ({"architecture": {"name": "x", "num_classes": 2, "options": []}}, r"architecture: options must be an object"),
        ({"architecture": {"name": "x", "num_classes": True}}, r"architecture: must have a name and a positive num_classes"),
        ({"classes": ["ants"]}, r"is damaged: torchvision/resnet18 has 2 outputs, but 1 class listed"),
        ({"display_names": {"ants": 3}}, r"display_names.ants: must be a string"),
        ({"preprocessing": {**FACTS["preprocessing"], "transform": {"geometry": {"image_size": 10**6}}}}, r"image_size 1000000 is not from 1 to 16384"),
        ({"preprocessing": {**FACTS["preprocessing"], "image_size": []}}, r"image_size \[\] is not from 1 to 16384"),
        ({"preprocessing": {**FACTS["preprocessing"], "image_size": 224.5}}, r"image_size 224.5 is not from 1 to 16384"),
        ({"preprocessing": {**FACTS["preprocessing"], "interpolation": 3}}, r"preprocessing: crop_ratio must be a number, interpolation a string"),
        ({"order": "fc"}, r"order: must be a list"),
        ({"order": [["fc"]]}, r"order.0: must be a string"),
        ({"weights": {"bytes": -1, "sha256": "0" * 64}}, r"weights.bytes: -1 is not an integer from 0"),
        ({"weights": []}, r"weights: must be an object"),
    ],
)
def test_each_field_is_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps(FACTS))
    assert read_model_json(tmp_path).classes == ("ants", "bees")
    (tmp_path / "model.json").write_text(json.dumps(FACTS | changes))
    with pytest.raises(UserError, match=message) as raised:
        read_model_json(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/model.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{" * 5000, '{"a":' * 5000, '{"format": 1e999}', '{"format": NaN}', "\0", '{"x": "\\ud800"}'])
def test_a_text_that_is_no_model_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model.json: "):
        read_model_json(tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import sys, dtl.models.model_json; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
