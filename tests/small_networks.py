"""Small networks for the tests of planning: residual ones with an editable number of blocks, and their state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dtl.checkpoint.transfer.plan import TransferPlan


class Block(nn.Module):
    def __init__(self, fan_in: int, width: int, *, shortcut_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width)) if fan_in != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Net(nn.Module):
    def __init__(self, blocks: tuple[int, int] = (2, 2), *, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(*[Block(8, 8) for _ in range(blocks[0])])
        self.layer2 = nn.Sequential(*[Block(8 if n == 0 else 12, 12) for n in range(blocks[1])])
        self.fc = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def net(*args: Any, **kwargs: Any) -> Net:
    with torch.device("meta"):
        return Net(*args, **kwargs)


def state(model: nn.Module, change: Callable[[str], str] = str) -> dict[str, torch.Tensor]:
    return {change(name): value for name, value in model.state_dict().items()}


def hashed(name: str) -> str:
    import hashlib

    return "t" + hashlib.sha1(name.encode()).hexdigest()[:8]


def right(plan: TransferPlan, change: Callable[[str], str] = str) -> None:
    assert plan.pairs
    assert {t: s for t, s in plan.pairs.items() if s != change(t)} == {}
