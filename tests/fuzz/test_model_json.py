"""Any model.json is one whose fields are right, or one line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from json_mutations import attempt, mutated_json

from dtl.models.model_json import MAX_IMAGE_SIZE, ModelFacts

FACTS: dict[str, Any] = {
    "format": 1,
    "architecture": {"name": "torchvision/resnet18", "num_classes": 2, "options": {"stem": 3}},
    "classes": ["ants", "bees"],
    "display_names": {"ants": "Ameisen"},
    "preprocessing": {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.1, 0.1],
        "image_size": 224,
        "interpolation": "bicubic",
        "crop_ratio": 0.875,
        "transform": {"geometry": {"name": "ShortSide", "image_size": 224, "resize": 256}, "interpolation": "bicubic"},
    },
    "metrics": {"top1": 0.9375},
    "made_by": {"run": "digits", "settings": {"data": {"train": "digits"}}},
    "order": ["fc.weight", "fc.bias"],
    "weights": {"bytes": 8, "sha256": "0" * 64},
}


def check(text: bytes) -> None:
    facts, refusal = attempt(lambda: ModelFacts.parse(text, "model.json"))
    if facts is None:
        assert refusal.startswith("model.json: ")
        return
    assert isinstance(facts.architecture["name"], str)
    assert facts.architecture["num_classes"] >= 1
    assert 1 <= facts.preprocessing["image_size"] <= MAX_IMAGE_SIZE
    assert all(isinstance(name, str) and "\0" not in name for name in (*facts.classes, *facts.order))
    assert facts.weights is None or len(facts.weights.sha256) == 64


@settings(max_examples=300, deadline=None)
@given(mutated_json(FACTS))
def test_a_changed_model_json(text: bytes) -> None:
    check(text)


@pytest.mark.soak
@settings(max_examples=50_000, deadline=None)
@given(mutated_json(FACTS))
def test_many_changed_files(text: bytes) -> None:
    check(text)
