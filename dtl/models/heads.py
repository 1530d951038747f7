"""Where a network's classification head is, and how it is replaced.

One rule for every family, no table: build the network on the meta device with a number of classes that nothing else has, and the
layers with that many outputs are the heads. A function that takes no number of classes is traced instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from dtl.errors import UserError
from dtl.models.init import Init, initialize
from dtl.models.meta import build_on_meta, meta_copy
from dtl.models.network import Network, num_outputs

# A prime that is no width of any network we know.
SENTINEL_CLASSES = 1511


def is_classifier(module: nn.Module) -> bool:
    """A layer that can be a head: linear, or a 1x1 convolution (SqueezeNet)."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)


def heads_by_sentinel(constructor: Callable[[int], nn.Module]) -> tuple[str, ...]:
    """Names of the layers whose output count follows the number of classes; the main head first. `constructor` takes that number."""
    module = build_on_meta(lambda: constructor(SENTINEL_CLASSES))
    found = [name for name, layer in module.named_modules() if is_classifier(layer) and num_outputs(layer) == SENTINEL_CLASSES]
    return _main_first(found, main=_declared_main(module))


def heads_by_tracing(module: nn.Module, image_size: int) -> tuple[str, ...]:
    """The name of the last classifier layer that runs and whose output count is the network's; empty when there is none."""
    ran: list[str] = []
    traced = meta_copy(module).eval()
    for name, layer in traced.named_modules():
        if is_classifier(layer):
            layer.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    with torch.no_grad():
        output = traced(torch.empty(2, 3, image_size, image_size, device="meta"))
    layers = dict(traced.named_modules())
    matching = [name for name in ran if isinstance(output, torch.Tensor) and num_outputs(layers[name]) == output.shape[-1]]
    return tuple(matching[-1:])


def replace_head(network: Network, num_outputs: int, *, init: Init = "default") -> None:
    """Fresh layers of `num_outputs` outputs for every head, each of the old one's kind, inputs, bias, dtype and device."""
    module = network.module
    for name in network.heads:
        new = _resized(module.get_submodule(name), num_outputs, name=name)
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, attribute, new)
        initialize([new], init)
        for owner in (parent, module):
            # timm, SqueezeNet and others keep the number beside the layer.
            if isinstance(getattr(owner, "num_classes", None), int):
                owner.__dict__["num_classes"] = num_outputs


def _resized(layer: nn.Module, num_classes: int, *, name: str) -> nn.Module:
    if not is_classifier(layer):
        raise UserError(f"the head {name!r} is a {type(layer).__name__}; a head must be a Linear layer or a 1x1 convolution")
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    # A shallow copy keeps the layer's class and all its settings; only what has the number of outputs in it is made anew.
    new: nn.Linear | nn.Conv2d = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.__dict__.pop("train", None)  # a frozen layer's, see freeze.py
    weight = layer.weight
    new.weight = nn.Parameter(weight.new_empty((num_classes, *weight.shape[1:])))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.new_empty(num_classes))
    if isinstance(new, nn.Linear):
        new.out_features = num_classes
    else:
        new.out_channels = num_classes
    new.reset_parameters()
    return new


def _declared_main(module: nn.Module) -> str | None:
    """timm says which layer is the classifier, and names the main one first."""
    declared = getattr(module, "pretrained_cfg", {}).get("classifier") if hasattr(module, "pretrained_cfg") else None
    if isinstance(declared, (tuple, list)):
        declared = declared[0] if declared else None
    return declared if isinstance(declared, str) else None


def _main_first(names: list[str], *, main: str | None) -> tuple[str, ...]:
    if not names:
        return ()
    # torchvision registers auxiliary heads, which branch off half-way, before the last layer.
    first = main if main in names else names[-1]
    return (first, *(name for name in names if name != first))
