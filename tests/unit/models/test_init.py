"""Initial values: of a whole network, and of a new head alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtl.models.build import build, replace_head


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
def test_initial_values(init: str) -> None:
    torch.manual_seed(0)
    module = build("dtl/resnet_tiny", num_classes=10, init=init).module  # type: ignore[arg-type]
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert (layer.bias == 0).all()
            fan_in = layer.weight[0].numel()
            fan_out = layer.weight.numel() // layer.weight.shape[1]
            variance = 2 / (fan_in + fan_out) if init == "xavier" else 2 / fan_out
            assert 0.75 < layer.weight.var().item() / variance < 1.3


def test_zero_is_for_linear_heads() -> None:
    """SqueezeNet's head is a convolution with a ReLU behind it: from zero it would never learn."""
    for name, zero in (("torchvision/squeezenet1_1", False), ("timm/efficientnet_b0", True)):
        network = build(name, num_classes=3)
        replace_head(network, 5, init="zero")
        head = network.module.get_submodule(network.heads[0])
        assert bool(head.weight.any()) is not zero
        assert bool(head.bias.any()) is not zero


def test_initial_values_of_a_new_head_only() -> None:
    network = build("timm/vit_tiny_patch16_224", num_classes=3, options={"img_size": 32})
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    replace_head(network, 5, init="xavier")
    after = network.module.state_dict()
    assert [key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])] == [
        "head.weight",
        "head.bias",
    ]
    assert (after["head.bias"] == 0).all()
