"""A network: a module, what must be known about it to fine-tune it, and what goes in (`Normalise`) and comes out (`forward_logits`) on its device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtl.config.models import ImageSize, sides
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
    without_gradient: dict[Hashable, frozenset[str]] = field(default_factory=dict, repr=False, compare=False)
    """What `dtl.models.freeze.unused_parameters` found, for each question that it was asked."""

    @property
    def num_outputs(self) -> int:
        return num_outputs(self.module.get_submodule(self.heads[0]))


def image_shape(module: nn.Module, num: int, size: ImageSize) -> tuple[int, int, int, int]:
    """Of `num` images that the network takes: [B, C, H, W]."""
    return (num, getattr(module, CHANNELS, 3), *sides(size))


CHANNELS = "in_chans"
"""The attribute of a network, and the option of its constructor, that says how many channels its images have, where these are not three."""


class Normalise:
    """Moves uint8 images [B, C, H, W] to the device and normalises them to float32, in the memory format that the network wants."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device, *, channels_last: bool) -> None:
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1) * 255.0
        self._scale = 1.0 / (torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1) * 255.0)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._device = device
        # Copies on a stream of their own overlap with the computation of the step before.
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def facts(self) -> list[float]:
        """Mean and scale [2 C], for the keys of cached features."""
        return [*self._mean.flatten().tolist(), *self._scale.flatten().tolist()]

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] float32 from uint8. Other types (cached features) are moved to the device and stay as they are."""
        images = self._moved(images)
        if images.dtype != torch.uint8:
            return images
        if images.is_contiguous(memory_format=torch.channels_last):
            # Over whole rows of pixels: a broadcast whose innermost dimension is the three channels takes a CPU several times as long.
            mean, scale = self._as_rows(images.shape[3])
            rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32).sub_(mean).mul_(scale)
            made = rows.view(len(rows), images.shape[2], -1, images.shape[1]).permute(0, 3, 1, 2)
        else:
            made = images.to(torch.float32).sub_(self._mean).mul_(self._scale)
        return made.contiguous(memory_format=self._format)

    def _as_rows(self, width: int) -> tuple[Tensor, Tensor]:
        """Mean and scale for a row of `width` pixels, each [C * width]."""
        if width not in self._rows:
            self._rows[width] = self._mean.flatten().repeat(width), self._scale.flatten().repeat(width)
        return self._rows[width]

    def _moved(self, images: Tensor) -> Tensor:
        if self._copies is None or images.device == self._device:
            return images.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._copies):
            moved = images.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        moved.record_stream(current)  # the memory belongs to the other stream, which must not use it again before this one is done
        return moved


def forward_logits(module: Callable[[torch.Tensor], Any], images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, K], and those of the auxiliary heads (Inception and GoogLeNet in train mode, one [B, K] each) for their loss."""
    output = module(images)
    if isinstance(output, torch.Tensor):
        return output, []
    if isinstance(output, dict):
        return output["logits"], []
    logits, *rest = output
    return logits, [auxiliary for auxiliary in rest if auxiliary is not None]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and each of its parts in its own mode again afterwards."""
    training = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, child in module.named_modules():
            child.training = training[name]


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
