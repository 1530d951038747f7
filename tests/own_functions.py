"""Augmentations as a user may write them, for data.augment.function."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2


def noisy(image: Tensor) -> Tensor:
    """Draws from all three global generators, changes its argument, and gives another size."""
    image[:, :1] = random.randrange(256)
    image[:, :, :1] = int(np.random.randint(256))
    return torch.cat([image, torch.randint(0, 256, (3, 2, image.shape[2]), dtype=torch.uint8)], dim=1)


posterized = v2.Compose([v2.RandomPosterize(bits=3, p=0.5), v2.RandomHorizontalFlip()])


def floats(image: Tensor) -> Tensor:
    return image / 255


def gray(image: Tensor) -> Tensor:
    return image[:1]


def array(image: Tensor) -> np.ndarray:
    return image.numpy()


def fails(image: Tensor) -> Tensor:
    raise ValueError("no such\nimage")
