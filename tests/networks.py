"""Small networks that tests name as `networks:FUNCTION`."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def small(num_classes: int) -> nn.Module:
    """Convolutions, batch norm and dropout: everything that a resume must get right, in 5,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, num_classes),
    )


def without_norms(num_classes: int) -> nn.Module:
    """Nothing that depends on how a batch is cut: the same gradients at any world size, but for rounding."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))


def diverging(num_classes: int) -> nn.Module:
    """Gives NaN once its weights have moved."""

    class Diverging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, num_classes)
            self.register_buffer("first", self.fc.weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            moved = (self.fc.weight - self.first).abs().max() > 0
            return self.fc(x.mean(dim=(2, 3))) * torch.where(moved, torch.nan, 1.0)

    return Diverging()


def failing(num_classes: int) -> nn.Module:
    """A mistake in the user's own code."""

    class Failing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("division by zero")

    return nn.Sequential(OrderedDict(body=nn.Flatten(), fc=Failing(3, num_classes)))


def stopped_and_diverging(num_classes: int) -> nn.Module:
    """`diverging`, and its process gets SIGTERM just before."""
    network = diverging(num_classes)

    def before(module: nn.Module, _: object) -> None:
        if module.training and not module.fc.weight.is_meta and (module.fc.weight - module.first).abs().max() > 0:
            os.kill(os.getpid(), signal.SIGTERM)

    network.register_forward_pre_hook(before)
    return network


def overflowing(num_classes: int) -> nn.Module:
    """Has a statistic that is infinite once its weights have moved; its loss stays finite."""

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, num_classes)
            self.register_buffer("first", self.fc.weight.detach().clone())
            self.register_buffer("running_level", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and not self.fc.weight.is_meta and (self.fc.weight - self.first).abs().max() > 0:
                self.running_level.fill_(torch.inf)  # type: ignore[operator]
            return self.fc(x.mean(dim=(2, 3)))

    return Overflowing()


def with_dropout(num_classes: int) -> nn.Module:
    """A head in a container with dropout of its own, as in torchvision's MobileNetV2."""
    backbone = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(OrderedDict(features=backbone, classifier=nn.Sequential(nn.Dropout(0.3), nn.Linear(48, num_classes))))


def squashed(num_classes: int) -> nn.Module:
    """A layer behind the head."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(8, num_classes), last=nn.Tanh()))


def hungry(num_classes: int, fits: int = 16, least: int | None = None, in_backward: bool = False, from_side: int = 0) -> nn.Module:
    """Out of memory above `fits` images of `from_side` pixels or more in training (`least` on the last rank), in the forward or the backward pass."""
    last = int(os.environ.get("RANK") or 0) == int(os.environ.get("WORLD_SIZE") or 1) - 1
    limit = least if least is not None and last else fits

    def check(images: int) -> None:
        if images > limit:
            raise torch.OutOfMemoryError(f"out of memory for {images} images")

    class Limit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            check(len(grad))
            return grad

    class Hungry(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Looks at the network's structure come with zeros, or without gradients.
            if self.training and not in_backward and torch.is_grad_enabled() and x.shape[-1] >= from_side and bool(x.any()):
                check(len(x))
            logits = super().forward(x)
            return Limit.apply(logits) if in_backward else logits

    return Hungry(*small(num_classes).children())


def wide(num_classes: int) -> nn.Module:
    """Gradients of more than 1 MiB, which DDP divides into several buckets after its first step."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, num_classes))


def unpooled(num_classes: int) -> nn.Module:
    """Has an operator without a deterministic kernel on any device."""

    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.unpool, self.small = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), small(num_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.small(self.unpool(*self.pool(x)))

    return Unpooled()


def mean_colour(num_classes: int) -> nn.Module:
    """Next to no computing: whatever time an epoch takes is spent elsewhere."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
