"""Networks by name: which library a name belongs to, and what is near a wrong one."""

from __future__ import annotations

import re

import pytest

from dtl.errors import UserError
from dtl.models import catalog
from dtl.models.build import build, model_names


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    catalog._timm_names.cache_clear()
    try:
        with pytest.raises(UserError, match=re.escape("pip install timm")):
            build("timm/resnet18", num_classes=2)
        assert not any(name.startswith("timm/") for name in model_names())
    finally:
        catalog._timm_names.cache_clear()


@pytest.mark.parametrize(
    ("name", "library", "full"),
    [
        ("resnet18", "torchvision", "torchvision/resnet18"),
        ("timm/resnet18", "timm", "timm/resnet18"),
        ("timm/resnet18.a1_in1k", "timm", "timm/resnet18.a1_in1k"),
        ("convnext_atto", "timm", "timm/convnext_atto"),
        ("resnet_tiny", "dtl", "dtl/resnet_tiny"),
        ("json:dumps", "function", "json:dumps"),
    ],
)
def test_a_name_without_a_library_is_dtls_then_torchvisions_then_timms(name: str, library: str, full: str) -> None:
    entry = catalog.find(name, own=True)
    assert (entry.library, entry.name) == (library, full)


def test_every_name_is_listed_once_under_its_library() -> None:
    names = model_names()
    assert len(names) == len(set(names))
    assert {"dtl/resnet_tiny", "torchvision/vit_b_16", "timm/vit_tiny_patch16_224"} <= set(names)


def test_near_names_stand_for_one_library_each() -> None:
    names = ["torchvision/resnet18", "timm/resnet18", "timm/vit_tiny"]
    assert catalog.nearest("resnet19", names) == "; did you mean torchvision/resnet18?", "timm has it too, torchvision comes first"
    assert catalog.nearest("timm/vit_tyny", names) == "; did you mean timm/vit_tiny?"
    assert catalog.nearest("nothing", names) == ""
