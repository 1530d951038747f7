"""Plain residual networks, as the tutorials write them ("Dive into Deep Learning", section 8.6, MIT-0 code).

Beside torchvision's ResNet: convolutions have biases, the shortcut has a convolution without a norm, the block registers its
convolutions before its norms, and the network is one nested `nn.Sequential`, so that parameter names are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        # The order of registration is the order of the state dict: all convolutions, then the norms.
        self.conv3: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.conv3 = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.conv3 is None else self.conv3(x)
        return torch.relu(y + shortcut)


def resnet18_plain(*, num_classes: int, small_images: bool = False) -> nn.Sequential:
    """The tutorials' ResNet-18. With `small_images` (32 pixels) the stem is one 3x3 convolution that keeps the resolution."""
    stem = _small_stem(64) if small_images else _imagenet_stem(64)
    return _plain_resnet(stem, widths=(64, 128, 256, 512), blocks_per_stage=2, num_classes=num_classes)


def resnet18_plain_small(*, num_classes: int) -> nn.Sequential:
    """`resnet18_plain` for images of 32 pixels."""
    return resnet18_plain(num_classes=num_classes, small_images=True)


def resnet_tiny(*, num_classes: int) -> nn.Sequential:
    """A network for images of 32 pixels that learns the built-in digits on two CPU cores in about a minute."""
    return _plain_resnet(_small_stem(16), widths=(16, 32, 64), blocks_per_stage=1, num_classes=num_classes)


PLAIN_RESNETS = {"resnet18_plain": resnet18_plain, "resnet18_plain_small": resnet18_plain_small, "resnet_tiny": resnet_tiny}


def _imagenet_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )


def _small_stem(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, kernel_size=3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def _plain_resnet(stem: nn.Sequential, *, widths: Sequence[int], blocks_per_stage: int, num_classes: int) -> nn.Sequential:
    stages = []
    in_channels = widths[0]
    for width in widths:
        stride = 1 if width == widths[0] else 2
        blocks = [ResidualBlock(in_channels, width, stride=stride)]
        blocks += [ResidualBlock(width, width) for _ in range(blocks_per_stage - 1)]
        stages.append(nn.Sequential(*blocks))
        in_channels = width
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(in_channels, num_classes))
