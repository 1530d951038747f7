"""Checkpointed and plain networks are the same network: results, gradients, statistics, names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dtl.errors import UserError
from dtl.models.activation import enable_activation_checkpointing
from dtl.models.build import build, forward_logits
from dtl.models.freeze import freeze, select

FAMILIES = [
    ("torchvision/resnet18", 64, {}),
    ("torchvision/densenet121", 64, {"drop_rate": 0.2}),
    ("timm/vit_tiny_patch16_224", 32, {"img_size": 32, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.5}),
    ("torchvision/convnext_tiny", 64, {"stochastic_depth_prob": 0.5}),
    ("dtl/resnet_tiny", 32, {}),
]


def _one_step(module: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    module.train()
    logits, _ = forward_logits(module, images)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return logits.detach(), gradients, dict(module.named_buffers())


@pytest.mark.parametrize(("name", "size", "options"), FAMILIES)
def test_same_results_gradients_and_statistics(name: str, size: int, options: dict[str, object]) -> None:
    network = build(name, num_classes=5, options=options)
    plain = copy.deepcopy(network.module)
    before = list(network.module.state_dict())
    blocks = enable_activation_checkpointing(network)
    assert blocks
    assert list(network.module.state_dict()) == before
    images = torch.randn(2, 3, size, size)
    logits, gradients, buffers = _one_step(network.module, images)
    plain_logits, plain_gradients, plain_buffers = _one_step(plain, images)
    assert torch.equal(logits, plain_logits)
    assert gradients.keys() == plain_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[key], msg=key)
    for key, buffer in buffers.items():
        assert torch.equal(buffer, plain_buffers[key]), key


def test_memory_is_saved() -> None:
    """What autograd keeps between forward and backward, in bytes."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    totals = []
    network = build("dtl/resnet18_plain_small", num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    for checkpointed in (False, True):
        if checkpointed:
            enable_activation_checkpointing(network)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.module(images)
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 2


def test_frozen_blocks_and_copies() -> None:
    network = build("dtl/resnet_tiny", num_classes=5)
    enable_activation_checkpointing(network)
    freeze(network.module, select(network, "last:2"))
    images = torch.randn(2, 3, 32, 32)
    for module in (network.module, copy.deepcopy(network.module), pickle.loads(pickle.dumps(network.module))):
        _, gradients, _ = _one_step(module, images)
        assert gradients.keys() == select(network, "last:2")
    twin = copy.deepcopy(network.module)
    with torch.no_grad():
        next(iter(twin.parameters())).zero_()
    assert not torch.equal(twin(images), network.module(images)), "a copy must run its own parameters"


def test_a_network_without_blocks_is_told() -> None:
    network = build("torchvision/vgg11", num_classes=5, meta=True)
    with pytest.raises(UserError, match="no blocks to checkpoint"):
        enable_activation_checkpointing(network)


def test_compiled() -> None:
    """Frozen and checkpointed networks compile, and statistics are still counted once. `aot_eager` needs no C++ compiler."""
    network = build("dtl/resnet_tiny", num_classes=5)
    freeze(network.module, select(network, "last:2"))
    plain = copy.deepcopy(network.module)
    enable_activation_checkpointing(network)
    images = torch.randn(4, 3, 32, 32)
    logits, gradients, buffers = _one_step(torch.compile(network.module, backend="aot_eager"), images)
    plain_logits, plain_gradients, plain_buffers = _one_step(plain, images)
    torch.testing.assert_close(logits, plain_logits)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[key.removeprefix("_orig_mod.")])
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, plain_buffers[key.removeprefix("_orig_mod.")])
    assert len(gradients) == len(plain_gradients)
