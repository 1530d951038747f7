"""uint8 images become the floats that the weights were trained with: the same bits whatever their layout in memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dtl.models.network import Normalise
from dtl.models.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(1, 1, 1), (1, 5, 3), (4, 1, 7), (4, 7, 1), (3, 32, 32), (2, 17, 23)]


@pytest.mark.parametrize(("shape", "channels_last"), list(product(SHAPES, (True, False))))
def test_layouts_give_the_same_bits_and_the_plain_formula(shape: tuple[int, int, int], channels_last: bool) -> None:
    number, height, width = shape
    images = torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height * width))
    kept = images.clone()
    normalise = Normalise(Preprocessing(mean=MEAN, std=STD), torch.device("cpu"), channels_last=channels_last)
    plain, last = normalise(images), normalise(images.contiguous(memory_format=torch.channels_last))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for made in (plain, last):
        assert made.shape == images.shape
        assert made.dtype == torch.float32
        assert made.is_contiguous(memory_format=memory_format)
    assert torch.equal(plain, last)
    expected = (images.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, kept), "the loader's buffer is not written to"


def test_sizes_may_change_from_batch_to_batch_and_features_pass_as_they_are() -> None:
    normalise = Normalise(Preprocessing(mean=MEAN, std=STD), torch.device("cpu"), channels_last=True)
    for size in (8, 12, 8):
        images = torch.full((2, 3, size, size), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        white = torch.tensor([(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)])
        torch.testing.assert_close(normalise(images), white.view(1, 3, 1, 1).expand(2, 3, size, size), rtol=1e-5, atol=1e-5)
    features = torch.randn(4, 16)
    assert normalise(features) is features
