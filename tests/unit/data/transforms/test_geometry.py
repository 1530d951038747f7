"""Boxes and windows: the papers' distributions, and what lies at the edges."""

from __future__ import annotations

import numpy as np
import torch

from dtl.config.models import AugmentConfig
from dtl.data.transforms.geometry import MAX_ASPECT, ShortSide, below, clip_to_window
from dtl.data.transforms.transforms import train_transform


def test_boxes_follow_the_paper() -> None:
    transform = train_transform(image_size=224, augment=AugmentConfig())
    count = 20_000
    draws = transform.draw(np.arange(count), np.full(count, 500), np.full(count, 375), seed=0, epoch=0)
    top, left, height, width = draws.placement.boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    area, aspect = height * width / (375 * 500), width / height
    assert 0.079 < area.min() < 0.085
    assert 0.95 < area.max() <= 1
    # Uniform area, cut where the box does not fit: torchvision's own mean for this size is 0.433 (60,000 draws, +- 0.001).
    assert abs(area.mean() - 0.433) < 0.006
    assert 0.73 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.36
    assert abs(draws.horizontal_flip.mean() - 0.5) < 0.02


def test_boxes_on_the_reduced_grid_are_the_drawn_ones_within_a_reduced_pixel() -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 1500, 3000), rng.integers(1, 1500, 3000)
    drawn, reduced = (
        train_transform(image_size=64, augment=AugmentConfig(reduced_decode=on)).draw(range(3000), widths, heights, seed=0, epoch=0).placement
        for on in (False, True)
    )
    assert drawn.reductions is None
    factors = reduced.reductions
    assert factors is not None
    assert set(factors.tolist()) == {1, 2, 4, 8}
    smallest = drawn.boxes[:, 2:].min(axis=1)
    assert (smallest >= 64 * np.where(factors == 1, 0, factors)).all()
    assert ((smallest < 64 * 2 * factors) | (factors == 8)).all()
    ends, sides = reduced.boxes[:, :2] + reduced.boxes[:, 2:], np.stack([heights, widths], axis=1)
    assert (reduced.boxes[:, :2] >= 0).all()
    assert (reduced.boxes[:, 2:] > 0).all()
    assert (ends <= sides).all()
    steps = factors[:, None]
    assert (reduced.boxes[:, :2] % steps == 0).all()
    assert ((ends % steps == 0) | (ends == sides)).all()
    for was, now in ((drawn.boxes[:, :2], reduced.boxes[:, :2]), (drawn.boxes[:, :2] + drawn.boxes[:, 2:], ends)):
        assert (np.abs(was - now) < steps).all()


def test_images_that_no_box_fits_fall_back_to_the_centre() -> None:
    transform = train_transform(image_size=8, augment=AugmentConfig())
    boxes = transform.draw([1, 2], [10_000, 4], [4, 10_000], seed=0, epoch=0).placement.boxes
    # No try can fit: 8 % of the area within 4:3 is already higher than the picture.
    assert boxes.tolist() == [[0, 4997, 4, 5], [4997, 0, 5, 4]]


def test_numbers_below_a_count_reach_its_last_and_no_further() -> None:
    counts = np.array([1, 3, 3, 7])
    assert below(counts, np.array([0.999, 0.0, np.nextafter(1.0, 0.0), 0.5])).tolist() == [0, 0, 2, 3]


def test_very_long_images_are_cut_to_a_stripe_before_they_are_resized() -> None:
    placement = ShortSide(image_size=8, resize_size=10).draw(np.array([0, 1]), np.array([100_000, 50]), np.array([10, 40]), seed=0, epoch=0)
    top, left, height, width = placement.boxes[0].tolist()
    assert (top, height, width) == (0, 10, MAX_ASPECT * 10)
    assert left == (100_000 - width) // 2, "its middle"
    assert placement.boxes[1].tolist() == [0, 0, 40, 50]
    assert placement.resized.tolist() == [[10, 10 * MAX_ASPECT], [10, 12]]


def test_the_window_takes_what_it_sees_and_zeroes_the_rest() -> None:
    picture = torch.arange(1, 7, dtype=torch.uint8).view(2, 3, 1).expand(2, 3, 3)
    target = torch.full((4, 4, 3), 9, dtype=torch.uint8)
    seen, part = clip_to_window(picture, target, (-1, 1), False, False)
    part.copy_(seen)
    assert target[..., 0].tolist() == [[0, 0, 0, 0], [2, 3, 0, 0], [5, 6, 0, 0], [0, 0, 0, 0]]
    target.fill_(9)
    seen, part = clip_to_window(picture, target, (-1, 1), True, False)
    part.copy_(seen.flip(1))
    assert target[..., 0].tolist() == [[0, 0, 0, 0], [0, 0, 3, 2], [0, 0, 6, 5], [0, 0, 0, 0]], "a mirrored window lies at the other side"
