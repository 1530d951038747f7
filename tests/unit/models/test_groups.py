"""Layer groups: every parameter once, from the input to the head, one block a group."""

from __future__ import annotations

import pytest
from torch import nn

from dtl.models.build import Network, Preprocessing, build
from dtl.models.groups import block_names, head_parameters, layer_groups

# Families, how many groups each has, and prefixes that the first, the last but one and the last group consist of.
FAMILIES = [
    ("resnet18", 10, ("conv1.", "bn1."), ("layer4.1.",), ("fc.",)),
    ("resnet50", 18, ("conv1.", "bn1."), ("layer4.2.",), ("fc.",)),
    (
        "vit_b_16",
        14,
        ("class_token", "conv_proj.", "encoder.pos_embedding"),
        ("encoder.layers.encoder_layer_11.", "encoder.ln."),
        ("heads.head.",),
    ),
    ("convnext_tiny", 23, ("features.0.",), ("features.7.2.", "classifier.0."), ("classifier.2.",)),
    ("mobilenet_v2", 20, ("features.0.",), ("features.18.",), ("classifier.1.",)),
    ("swin_t", 17, ("features.0.",), ("features.7.1.", "norm."), ("head.",)),
    (
        "densenet121",
        63,
        ("features.conv0.", "features.norm0."),
        ("features.denseblock4.denselayer16.", "features.norm5."),
        ("classifier.",),
    ),
    ("dtl/resnet18_plain", 10, ("0.",), ("4.1.",), ("7.",)),
    ("vgg11_bn", 11, ("features.0.", "features.1."), ("classifier.3.",), ("classifier.6.",)),
    ("inception_v3", 17, ("Conv2d_1a_3x3.",), ("Mixed_7c.",), ("AuxLogits.", "fc.")),
    ("googlenet", 13, ("conv1.",), ("inception5b.",), ("aux1.", "aux2.", "fc.")),
    ("squeezenet1_0", 10, ("features.0.",), ("features.12.",), ("classifier.1.",)),
    ("efficientnet_b0", 19, ("features.0.",), ("features.8.",), ("classifier.1.",)),
    ("regnet_y_400mf", 18, ("stem.",), ("trunk_output.block4.block4-5.",), ("fc.",)),
    ("timm/vit_tiny_patch16_224", 14, ("cls_token", "pos_embed", "patch_embed."), ("blocks.11.", "norm."), ("head.",)),
    ("timm/convnext_atto", 17, ("stem.",), ("stages.3.blocks.1.", "head.norm."), ("head.fc.",)),
    (
        "timm/deit_tiny_distilled_patch16_224",
        14,
        ("cls_token", "dist_token", "pos_embed", "patch_embed."),
        ("blocks.11.", "norm."),
        ("head.", "head_dist."),
    ),
]


@pytest.mark.parametrize(("name", "count", "first", "before_last", "last"), FAMILIES)
def test_families(name: str, count: int, first: tuple[str, ...], before_last: tuple[str, ...], last: tuple[str, ...]) -> None:
    network = build(name, num_classes=5, meta=True)
    names = [key for key, _ in network.module.named_parameters()]
    groups = layer_groups(network)
    assert sorted(key for group in groups for key in group) == sorted(names)
    assert all(groups)
    for group, prefixes in ((groups[0], first), (groups[-2], before_last), (groups[-1], last)):
        assert all(key.startswith(prefixes) for key in group), group
        assert {prefix for prefix in prefixes if any(key.startswith(prefix) for key in group)} == set(prefixes), group
    assert frozenset(groups[-1]) == head_parameters(network)
    assert len(groups) == count


def test_a_resnet_block_by_block() -> None:
    groups = layer_groups(build("resnet18", num_classes=5, meta=True))
    prefixes = ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc"]
    assert [group[0].startswith(prefix) for group, prefix in zip(groups, prefixes)] == [True] * 10
    assert groups[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]


def test_a_wrapped_backbone_and_shared_parameters() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build("resnet18", num_classes=5, meta=True).module
            self.backbone.fc = nn.Identity()
            self.head = nn.Linear(512, 5, device="meta")
            self.tied = self.head

    groups = layer_groups(Network(Wrapped(), "wrapped", ("head",), Preprocessing()))
    assert len(groups) == 10
    assert groups[-1] == ["head.weight", "head.bias"]


def test_blocks() -> None:
    assert block_names(build("dtl/resnet_tiny", num_classes=5, meta=True)) == ["1.0", "2.0", "3.0"]
    assert block_names(build("vit_b_16", num_classes=5, meta=True)) == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    assert len(block_names(build("convnext_tiny", num_classes=5, meta=True))) == 18
    assert block_names(build("vgg11", num_classes=5, meta=True)) == []
