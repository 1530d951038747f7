"""Pillow's and torchvision's pixels, torchvision's operation spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dtl.data.transforms import pixels
from dtl.data.transforms.pixels import NUM_BINS, RAND_AUGMENT, TRIVIAL_AUGMENT_WIDE, Operation, apply_operation, draw_operations

FACTORS = [0.0, 0.1, 0.37, 0.9, 1.0, 1.3, 1.9]


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:56, 0:56]
    smooth = np.stack([np.sin(x / (5 + k)) * np.cos(y / 7) * 60 + 100 for k in range(3)], axis=2).astype(np.uint8)
    noise = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    return [smooth, noise, np.full((56, 56, 3), 131, np.uint8), np.clip(noise, 0, 1), noise[:3, :2], noise[:1, :1], noise[:, :17]]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (pixels.brightness, ImageEnhance.Brightness),
        (pixels.contrast, ImageEnhance.Contrast),
        (pixels.saturation, ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(ours: Callable[[np.ndarray, float], np.ndarray], pillows: type, factor: float) -> None:
    for image in _images():
        assert np.array_equal(ours(image, factor), np.asarray(pillows(Image.fromarray(image)).enhance(factor)))


def test_gray_posterize_solarize_equalize_are_pillows() -> None:
    for image in _images():
        picture = Image.fromarray(image)
        assert np.array_equal(pixels.gray(image), np.asarray(picture.convert("L")))
        assert np.array_equal(pixels.grayscale(image)[..., 1], pixels.gray(image))
        for bits in range(1, 9):
            assert np.array_equal(pixels.posterize(image, bits), np.asarray(ImageOps.posterize(picture, bits)))
        for threshold in (0, 17, 128, 255, 256):
            assert np.array_equal(pixels.solarize(image, threshold), np.asarray(ImageOps.solarize(picture, threshold)))
        assert np.array_equal(pixels.equalize(image), np.asarray(ImageOps.equalize(picture)))


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.0, 0.05, 0.33, 0.5])
def test_hue_is_torchvisions_within_rounding(shift: float) -> None:
    from torchvision.transforms.v2 import functional

    for image in _images():
        theirs = functional.adjust_hue(torch.from_numpy(image).permute(2, 0, 1), shift).permute(1, 2, 0).numpy()
        assert _difference(pixels.hue(image, shift), theirs).max() <= 1
    assert _difference(pixels.hue(_images()[1], 0.0), _images()[1]).max() == 0


@pytest.mark.parametrize("degrees", [0.0, 1.5, -20.0, 90.0, 135.0, 180.0])
def test_rotation_is_torchvisions_within_rounding(degrees: float) -> None:
    from torchvision.transforms import v2

    for image in _images():
        planes = torch.from_numpy(image).permute(2, 0, 1)
        theirs = v2.functional.rotate(planes, degrees, interpolation=v2.InterpolationMode.BILINEAR)
        assert _difference(pixels.rotate(image, degrees), theirs.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize(("ours", "name"), [(RAND_AUGMENT, "RandAugment"), (TRIVIAL_AUGMENT_WIDE, "TrivialAugmentWide")])
@pytest.mark.parametrize("size", [32, 224, 299])
def test_the_space_is_torchvisions(ours: tuple[Operation, ...], name: str, size: int) -> None:
    from torchvision.transforms import v2

    theirs = getattr(v2, name)._AUGMENTATION_SPACE
    assert [op.name for op in ours] == list(theirs)
    assert getattr(v2, name)().num_magnitude_bins == NUM_BINS
    for op in ours:
        magnitudes, signed = theirs[op.name]
        values = magnitudes(NUM_BINS, size, size)
        assert op.signed == signed
        assert (op.magnitudes is None) == (values is None)
        if op.magnitudes is not None:
            np.testing.assert_allclose(op.magnitudes(size), values.double().numpy(), rtol=1e-6, atol=1e-7)
            # torchvision's float32 table says 15.999999 pixels at TrivialAugment's middle bin, and rounds it down; ours says 16.


@pytest.mark.parametrize("name", ["RandAugment", "TrivialAugmentWide"])
def test_each_operation_at_each_magnitude_is_torchvisions(name: str) -> None:
    from torchvision.transforms import v2

    space = {"RandAugment": RAND_AUGMENT, "TrivialAugmentWide": TRIVIAL_AUGMENT_WIDE}[name]
    reference = getattr(v2, name)()
    worst = {}
    for number, op in enumerate(space):
        for image in _images()[:2]:
            values = [0.0] if op.magnitudes is None else op.magnitudes(56)[[0, 9, 15, 30]].tolist()
            for value in [*values, *(-v for v in values if op.signed)]:
                theirs = reference._apply_image_or_video_transform(
                    torch.from_numpy(image).permute(2, 0, 1), op.name, value, interpolation=v2.InterpolationMode.NEAREST, fill={}
                )
                difference = _difference(apply_operation(space, number, value, image), theirs.permute(1, 2, 0).numpy())
                worst[op.name] = max(worst.get(op.name, 0.0), float((difference > 1).mean()))
    geometric = {"ShearX", "ShearY", "Rotate"}  # a position on the very edge of two pixels may go to either
    assert {key: share for key, share in worst.items() if share > (0.01 if key in geometric else 0)} == {}


def test_draws_cover_the_space_evenly_and_by_sample() -> None:
    samples = np.arange(14_000)
    chosen, values = draw_operations(TRIVIAL_AUGMENT_WIDE, samples, num_ops=1, magnitude=None, image_size=224, seed=0, epoch=0)
    counts = np.bincount(chosen[:, 0], minlength=14)
    assert counts.min() > 850
    assert counts.max() < 1150
    rotations = values[chosen == 5]
    assert len(np.unique(np.abs(rotations))) == NUM_BINS
    assert abs((rotations > 0).mean() - (rotations < 0).mean()) < 0.1
    again = draw_operations(TRIVIAL_AUGMENT_WIDE, samples[500:510], num_ops=1, magnitude=None, image_size=224, seed=0, epoch=0)
    assert np.array_equal(again[0], chosen[500:510])
    assert np.array_equal(again[1], values[500:510])
    two, fixed = draw_operations(RAND_AUGMENT, samples, num_ops=2, magnitude=9, image_size=224, seed=0, epoch=0)
    assert two.shape == fixed.shape == (14_000, 2)
    assert (two[:, 0] != two[:, 1]).mean() > 0.9
    assert set(np.abs(fixed[two == 5])) == {9.0}
