"""Initial values, only for the given modules: transferred weights are never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from dtl.config import Config

Init = Literal["default", "library", "xavier", "kaiming", "zero"]
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)


def initialize(modules: Iterable[nn.Module], init: Init) -> None:
    """Set the weights of convolutions, linear layers and attention by `init`, biases to zero, norms to one and zero.

    `default` and `library` leave what the modules' own constructors chose. Other parameters (class tokens, position embeddings, layer scales)
    keep their constructor's values. `zero` is for heads: linear layers alone, since a convolution may have a ReLU behind it, which would never leave zero.
    """
    if init in ("default", "library"):
        return
    if init == "zero":
        for root in modules:
            for parameter in root.parameters() if isinstance(root, nn.Linear) else ():
                nn.init.zeros_(parameter)
        return
    fill = _xavier if init == "xavier" else _kaiming
    for root in modules:
        for module in root.modules():
            _initialize_one(module, fill)


def head_init(config: Config) -> Init:
    """How a run's new heads begin. Beside loaded weights it is zero: libraries draw heads for training from scratch, and where they are large
    (timm's and torchvision's EfficientNets: up to 1 / sqrt(classes)) a short training never makes up for the noise."""
    return "zero" if config.transfer is not None and config.model.init == "default" else config.model.init


@torch.no_grad()
def _initialize_one(module: nn.Module, fill: Callable[[torch.Tensor], object]) -> None:
    if is_norm(module):
        _set(module, "weight", 1.0)
        _set(module, "bias", 0.0)
    elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        fill(module.weight)
        _set(module, "bias", 0.0)
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = getattr(module, name)
            if weight is not None:
                fill(weight)
        _set(module, "in_proj_bias", 0.0)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer, another library's too (timm's RmsNorm ...): vectors only, and named a norm."""
    if isinstance(module, NORMS):
        return True
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return named and bool(own) and len(own) == len(list(module.parameters())) and all(vector.ndim == 1 for vector in own)


def _set(module: nn.Module, name: str, value: float) -> None:
    tensor = getattr(module, name, None)
    if isinstance(tensor, torch.Tensor):
        tensor.fill_(value)


def _xavier(weight: torch.Tensor) -> None:
    nn.init.xavier_uniform_(weight)


def _kaiming(weight: torch.Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
