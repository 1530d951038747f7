"""Small networks that tests name as `networks:FUNCTION`."""

from __future__ import annotations

from collections import OrderedDict

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


def with_dropout(num_classes: int) -> nn.Module:
    """A head in a container with dropout of its own, as in torchvision's MobileNetV2."""
    backbone = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(OrderedDict(features=backbone, classifier=nn.Sequential(nn.Dropout(0.3), nn.Linear(48, num_classes))))
