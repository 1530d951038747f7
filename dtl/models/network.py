"""A network: a module, and what must be known about it to fine-tune it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from dtl.models.preprocessing import Preprocessing


@dataclass
class Network:
    """A module, and what fine-tuning must know about it. `dtl.models.build.build` makes one.

    `module` maps normalised images, float32 [B, 3, H, W], to logits [B, K]; use `forward_logits`, since some modules return more. `heads` are
    the dotted names of its classification layers (Linear or 1x1 convolution with K outputs): the main one first, then auxiliary ones.
    `preprocessing` is what its images must look like. `name`, `num_outputs` and `options` are enough to build it again.
    """

    module: nn.Module
    name: str
    heads: tuple[str, ...]
    preprocessing: Preprocessing
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        return num_outputs(self.module.get_submodule(self.heads[0]))


def forward_logits(module: Callable[[torch.Tensor], Any], images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, K], and those of the auxiliary heads (Inception and GoogLeNet in train mode, one [B, K] each) for their loss."""
    output = module(images)
    if isinstance(output, torch.Tensor):
        return output, []
    if isinstance(output, dict):
        return output["logits"], []
    logits, *rest = output
    return logits, [auxiliary for auxiliary in rest if auxiliary is not None]


def to_device(module: nn.Module, device: torch.device, *, channels_last: Literal["auto"] | bool = "auto") -> bool:
    """Move the network to `device`, in the channels last memory format where it has convolutions ("auto") or as asked.

    Returns whether it is channels last: its images should then be too.
    """
    if channels_last == "auto":
        channels_last = any(isinstance(part, nn.Conv2d) for part in module.modules())
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    return channels_last


def num_outputs(layer: nn.Module) -> int:
    """The number of outputs (classes) of a head's layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.out_channels
