"""Modules on the meta device: the same names, shapes and types as with memory."""

from __future__ import annotations

from dtl.models.build import build
from dtl.models.meta import meta_copy


def test_names_without_a_library_and_meta_builds_agree() -> None:
    assert build("resnet18", num_classes=2, meta=True).name == "torchvision/resnet18"
    assert build("resnet_tiny", num_classes=2, meta=True).name == "dtl/resnet_tiny"
    assert build("convnext_atto", num_classes=2, meta=True).name == "timm/convnext_atto"
    for name in ("dtl/resnet_tiny", "torchvision/regnet_x_400mf", "timm/vit_tiny_patch16_224"):
        real, shapes = build(name, num_classes=2).module.state_dict(), build(name, num_classes=2, meta=True).module.state_dict()
        assert [(key, t.shape, t.dtype) for key, t in real.items()] == [(key, t.shape, t.dtype) for key, t in shapes.items()]


def test_meta_copy_keeps_everything_but_the_data() -> None:
    network = build("dtl/resnet_tiny", num_classes=2)
    copy = meta_copy(network.module)
    assert all(tensor.is_meta for tensor in copy.state_dict().values())
    assert not any(tensor.is_meta for tensor in network.module.state_dict().values())
    assert list(copy.state_dict()) == list(network.module.state_dict())
