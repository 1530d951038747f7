"""The same photo is recognised by its pixels, another one of the same kind is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dtl.data.near import Pairs, near_pairs
from dtl.data.same_photo import ALIKE, FINE, SAME, SIDE, of_images, registered, thumbnails, with_mirrored


def photo(seed: int, *, side: int = 160) -> Tensor:
    """[side, side] in 0..1: smooth shapes, and details of several sizes."""
    draw = torch.Generator().manual_seed(seed)
    layers = [interpolate(torch.randn(1, 1, size, size, generator=draw), (side, side), mode="bicubic")[0, 0] * size**-0.5 for size in (4, 8, 16, 40, 80)]
    image = torch.stack(layers).sum(0)
    return (image - image.min()) / (image.max() - image.min())


def small(image: Tensor, side: int = SIDE) -> Tensor:
    return interpolate(image[None, None], (side, side), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def alike(images: list[Tensor], least: float = ALIKE) -> Pairs:
    return of_images(near_pairs(with_mirrored(thumbnails(torch.stack(images))), least), len(images))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda image: image.flip(1),
    "cropped": lambda image: image[4:-4, 4:-4],
    "cropped at a corner": lambda image: image[8:, 8:],
    "brighter": lambda image: image * 1.3,
    "darker and flatter": lambda image: image * 0.5 + 0.1,
    "noisy": lambda image: image + 0.03 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)),
    "resized": lambda image: interpolate(image[None, None], (80, 80), mode="bilinear", antialias=True)[0, 0],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photo_is_the_same_one(change: str) -> None:
    for seed in range(3):
        one, other = small(photo(seed)), small(CHANGES[change](photo(seed)))
        found = alike([one, other])
        assert len(found) == 1
        assert found.cosine[0] >= ALIKE
        assert registered(one, other) >= SAME
        assert registered(one, other) == registered(other, one)
        if len(CHANGES[change](photo(seed))) >= FINE:
            assert registered(small(photo(seed), FINE), small(CHANGES[change](photo(seed)), FINE)) >= SAME


def test_photos_of_one_outline_with_other_details_are_told_apart_by_the_finer_look() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    outline = 0.05 + torch.sigmoid((1 - ((x / 0.5) ** 2 + (y / 0.7) ** 2).sqrt()) / 0.03)

    def one_of_them(seed: int) -> Tensor:
        details = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(seed))
        return (outline * (0.6 + 0.1 * interpolate(details, (256, 256), mode="bicubic")[0, 0])).clamp(0, 1)

    one, other = one_of_them(1), one_of_them(2)
    assert registered(small(one), small(other)) >= SAME
    assert registered(small(one, FINE), small(other, FINE)) < SAME
    assert registered(small(one, FINE), small(one[6:-6, 6:-6], FINE)) >= SAME


def test_other_photos_are_others() -> None:
    photos = [small(photo(seed)) for seed in range(8)]
    assert max(registered(one, other) for one in photos[:4] for other in photos[4:]) < SAME - 0.2
    assert registered(photos[0], photos[0]) == pytest.approx(1, abs=1e-4)


def test_an_image_without_a_pattern_is_like_no_other() -> None:
    flat = torch.full((SIDE, SIDE), 0.5)
    assert registered(flat, small(photo(0))) == registered(small(photo(0)), flat) == 0
    assert not thumbnails(torch.stack([flat, flat])).any()
    assert len(alike([flat, flat, torch.zeros(SIDE, SIDE)])) == 0


def test_a_symmetric_image_is_no_twin_of_itself_and_pairs_are_named_once() -> None:
    image = small(photo(1))
    both = (image + image.flip(1)) / 2
    found = alike([both, both, image, image.flip(1)], 0.999)
    assert list(zip(found.first.tolist(), found.second.tolist())) == [(0, 1), (2, 3)]
    assert np.all(found.cosine <= 1)
