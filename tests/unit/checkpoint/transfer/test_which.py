"""Which network a file of weights is for: the table of shapes that is shipped, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from benchmarks.transfer_cases import HF_BLOCK, State, renamed, split_qkv, without
from dtl.checkpoint.transfer import which as module
from dtl.checkpoint.transfer.layers.layer import specs_of
from dtl.checkpoint.transfer.which import Shapes, looks_like, summary, versions, which
from dtl.models.catalog import find, model_names
from dtl.models.meta import build_on_meta


def state_of(name: str, **options: object) -> State:
    return build_on_meta(lambda: find(name).construct(**options)).state_dict()


def test_the_table_has_every_network_of_the_versions_that_it_names() -> None:
    table = Shapes.load(module.TABLE)
    assert set(table.models) <= set(model_names()) or table.versions != versions()
    assert len(table.models) > 1400
    assert len(table.models) == len(table.sizes)


@pytest.mark.parametrize(
    ("name", "changed", "first", "words"),
    [
        (
            "torchvision/mobilenet_v2",
            lambda s: s,
            "torchvision/mobilenet_v2",
            "52 convolutions and 1 linear layer look like torchvision/mobilenet_v2 (312 of 312",
        ),
        ("torchvision/resnet50", lambda s: without(s, "num_batches"), "torchvision/resnet50", "(265 of 265 tensors fit)"),
        ("timm/resnet50", lambda s: renamed(s, (r"layer(\d)", r"stage\1")), "torchvision/resnet50", "(318 of 318 tensors fit, under other names)"),
        ("timm/vit_small_patch16_224", lambda s: renamed(split_qkv(s), *HF_BLOCK), "timm/vit_small_patch16_224", "198 tensors fit, under other names)"),
        ("timm/convnext_tiny", lambda s: dict(sorted(s.items())), "timm/convnext_tiny", "timm/convnext_tiny (180 of 180 tensors fit)"),
    ],
)
def test_the_network_is_found_under_other_names_with_another_head(name: str, changed: Callable[[State], State], first: str, words: str) -> None:
    specs = specs_of(changed(state_of(name, num_classes=7)))
    found = which(specs)
    assert found[0].model == first
    assert len(found) == 3
    assert found[0].share == 1 >= found[1].share >= found[2].share
    assert words in summary(specs, found)


def test_a_refusal_names_another_network_only_where_that_is_clear() -> None:
    specs = specs_of(state_of("torchvision/resnet18", num_classes=3))
    likely = looks_like(specs, "torchvision/mobilenet_v2")
    assert likely is not None
    assert str(likely) == "torchvision/resnet18 (120 of 120 tensors fit)"
    assert looks_like(specs, "timm/resnet18.a1_in1k") is None
    own = nn.Sequential(nn.Conv2d(3, 17, 3), nn.Conv2d(17, 19, 3), nn.Linear(19, 5)).state_dict()
    assert looks_like(specs_of(own), "torchvision/resnet18") is None
    assert summary(specs_of(own), which(specs_of(own))) == "2 convolutions and 1 linear layer look like no network of torchvision or timm"
    assert which([]) == []


def test_networks_that_the_table_lacks_are_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    table = Shapes.of(["torchvision/resnet18", "timm/no_such_network"], lines.append)
    assert lines[0].startswith("timm/no_such_network is left out: unknown model")
    monkeypatch.setenv("DTL_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_table", lambda: table)
    monkeypatch.setattr(module, "versions", lambda: "torchvision 9.9, timm 9.9")
    monkeypatch.setattr(module, "model_names", lambda: ["torchvision/resnet18", "torchvision/squeezenet1_0"])
    specs = specs_of(state_of("torchvision/squeezenet1_0"))
    said: list[str] = []
    for _ in range(2):
        assert which(specs, log=said.append)[0].model == "torchvision/squeezenet1_0"
    assert said == [f"the table of shapes is of {table.versions}; 1 network of torchvision 9.9, timm 9.9 is built once to be compared, too"]
    assert which(specs)[0].model == "torchvision/resnet18"  # in a refusal nothing is built
