"""Colour and warp operations on one uint8 image [H,W,3], in NumPy; RandAugment's and TrivialAugment's choice among them.

Brightness, contrast, saturation and gray give the very pixels of Pillow's ImageEnhance (what torchvision's transforms do to Pillow
images); the others are within rounding of torchvision's tensor kernels. They are ours for two reasons: importing torchvision costs
every loader worker four seconds of CPU, and here a result depends on no thread count, since there is no parallel float sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from dtl.config.models import ImageSize, sides
from dtl.data.transforms.geometry import Ints, Pixels, below
from dtl.keyed import uniform

Table = npt.NDArray[np.uint8]

_LEVELS = np.arange(256, dtype=np.float32)
_THIRTEENTHS = ((2 * np.arange(13 * 255 + 1) + 13) // 26).astype(np.float32)  # n / 13, rounded


def gray(image: Pixels) -> Pixels:
    """Luma [H,W] by ITU-R 601, in Pillow's 16-bit integer arithmetic."""
    channels = image.astype(np.uint32)
    luma = channels[..., 0] * 19595 + channels[..., 1] * 38470 + channels[..., 2] * 7471 + 0x8000
    return (luma >> 16).astype(np.uint8)


def grayscale(image: Pixels) -> Pixels:
    """The luma in all three channels."""
    return np.repeat(gray(image)[..., None], 3, axis=2)


def brightness(image: Pixels, factor: float) -> Pixels:
    """0 is black, 1 the image."""
    return _look_up(image, _blend(np.zeros(1, np.float32), _LEVELS, factor))


def contrast(image: Pixels, factor: float) -> Pixels:
    """0 is the mean gray, 1 the image."""
    luma = gray(image)
    mean = int(int(luma.sum(dtype=np.int64)) / luma.size + 0.5)
    return _look_up(image, _blend(np.full(1, mean, np.float32), _LEVELS, factor))


def saturation(image: Pixels, factor: float) -> Pixels:
    """0 is gray, 1 the image."""
    luma = gray(image).astype(np.float32)
    result = np.empty_like(image)
    for channel in range(3):  # by planes: NumPy is slow along an axis of three
        result[..., channel] = _blend(luma, image[..., channel].astype(np.float32), factor)
    return result


def hue(image: Pixels, shift: float) -> Pixels:
    """Turn the colour wheel by `shift` of a full turn, saturation and value kept (in floating point, unlike Pillow's 8-bit HSV)."""
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = 1 / np.where(chroma == 0, np.float32(1), chroma)
    # The sixth of the wheel, counted from red: -1 ... 5.
    sixth = np.where(value == red, (green - blue) * scale, np.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4))
    result = np.empty_like(image)
    for channel, position in enumerate((5, 3, 1)):
        k = sixth + np.float32(6 * shift + position)
        k -= 6 * np.floor(k * np.float32(1 / 6))
        np.minimum(k, 4 - k, out=k)
        np.clip(k, 0, 1, out=k)
        k *= chroma
        result[..., channel] = value - k + np.float32(0.5)
    return result


def sharpness(image: Pixels, factor: float) -> Pixels:
    """0 is smoothed by a 3x3 kernel (5 in the middle, 1 around, over 13), 1 the image; the border stays as it is."""
    height, width, _ = image.shape
    if height <= 2 or width <= 2:
        return image
    wide = image.astype(np.int16)  # 13 * 255 fits
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:-2] + rows[1:-1] + rows[2:] + 4 * wide[1:-1, 1:-1]
    smooth = image.astype(np.float32)
    smooth[1:-1, 1:-1] = _THIRTEENTHS[total]
    return _blend(smooth, image.astype(np.float32), factor)


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keep the upper `bits` bits of each channel."""
    kept: Pixels = image & np.uint8(256 - (1 << (8 - bits)))
    return kept


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Invert every value at or above `threshold` (0 ... 255)."""
    inverted: Pixels = image ^ ((image >= threshold).view(np.uint8) * np.uint8(255))
    return inverted


def autocontrast(image: Pixels) -> Pixels:
    """Stretch each channel to the full range; a channel of one value stays."""
    result = np.empty_like(image)
    for channel in range(3):
        plane = image[..., channel]
        low, high = int(plane.min()), int(plane.max())
        scale = np.float32(255) / np.float32(high - low) if high > low else np.float32(1)
        table = np.clip((_LEVELS - np.float32(low if high > low else 0)) * scale, 0, 255)
        result[..., channel] = _look_up(plane, table.astype(np.uint8))
    return result


def equalize(image: Pixels) -> Pixels:
    """Flatten each channel's histogram, by Pillow's table: step = (pixels that are not the brightest value) // 255."""
    result = np.empty_like(image)
    for channel in range(3):
        plane = image[..., channel]
        counts = np.bincount(plane.ravel(), minlength=256)
        step = (plane.size - int(counts[counts.nonzero()[0][-1]])) // 255
        if step == 0:
            result[..., channel] = plane
            continue
        before = np.cumsum(counts) - counts
        result[..., channel] = _look_up(plane, np.clip((before + step // 2) // step, 0, 255).astype(np.uint8))
    return result


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Rotate counter-clockwise about the centre, bilinear, zeros outside, same size."""
    height, width, _ = image.shape
    x, y = _rotated_positions(height, width, degrees)
    grid = np.stack([2 * x / width - 1, 2 * y / height - 1], axis=2).astype(np.float32)
    planes = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))
    # grid_sample splits its work by image only, so that one image is always one thread's.
    turned = grid_sample(planes[None], torch.from_numpy(grid)[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    result: Pixels = np.rint(turned[0].numpy()).astype(np.uint8).transpose(1, 2, 0)
    return result


def rotate_nearest(image: Pixels, degrees: float) -> Pixels:
    """As `rotate`, nearest neighbour (what RandAugment and TrivialAugment use)."""
    return _gather(image, *_rotated_positions(image.shape[0], image.shape[1], degrees))


def shear_x(image: Pixels, slope: float) -> Pixels:
    """Move each row by `slope` pixels per row, about the upper left corner."""
    x, y = _positions(image.shape[0], image.shape[1])
    return _gather(image, x + slope * y, np.broadcast_to(y, (image.shape[0], image.shape[1])))


def shear_y(image: Pixels, slope: float) -> Pixels:
    """Move each column by `slope` pixels per column, about the upper left corner."""
    x, y = _positions(image.shape[0], image.shape[1])
    return _gather(image, np.broadcast_to(x, (image.shape[0], image.shape[1])), y + slope * x)


def translate(image: Pixels, *, right: int = 0, down: int = 0) -> Pixels:
    """Move the image, zeros behind it."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    if abs(right) < width and abs(down) < height:
        result[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
    return result


def _blend(start: npt.NDArray[np.float32], end: npt.NDArray[np.float32], factor: float) -> Pixels:
    """start + factor * (end - start) in float32, clipped and rounded down, as Pillow's Image.blend; 1 returns `end` exactly."""
    mixed = end - start
    mixed *= np.float32(factor)
    mixed += start
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _look_up(image: Pixels, table: Table) -> Pixels:
    return np.take(table, image)  # twice as fast as table[image]


def _positions(height: int, width: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Pixel centres: x [1,W] and y [H,1], with the upper left corner of the image at 0."""
    return np.arange(width, dtype=np.float64)[None, :] + 0.5, np.arange(height, dtype=np.float64)[:, None] + 0.5


def _rotated_positions(height: int, width: int, degrees: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = _positions(height, width)
    right, down = x - width / 2, y - height / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cosine * right - sine * down + width / 2, sine * right + cosine * down + height / 2


def _gather(image: Pixels, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Pixels:
    """The pixel that holds each position [H,W]; zeros outside."""
    height, width, _ = image.shape
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = np.where(inside, row * width + column, 0)
    found: Pixels = image.reshape(-1, image.shape[2])[index] * inside[..., None]
    return found


# RandAugment (Cubuk et al. 2019, arXiv 1909.13719) and TrivialAugment Wide (Mueller and Hutter 2021, arXiv 2103.10158): the operations, their
# ranges and the 31 magnitude bins are torchvision's; the numbers are drawn for a whole batch by key.
NUM_BINS = 31


Magnitudes = Callable[[ImageSize], npt.NDArray[np.float64]]


class Operation(NamedTuple):
    """`magnitudes(image_size)` gives the value of each bin, None where the operation has no strength; `signed` ones turn by a coin."""

    name: str
    magnitudes: Magnitudes | None
    signed: bool


def _even(start: float, end: float) -> Magnitudes:
    return lambda size: np.linspace(start, end, NUM_BINS)


def _share_of_width(share: float) -> Magnitudes:
    return lambda size: np.linspace(0.0, share * sides(size)[1], NUM_BINS)


def _share_of_height(share: float) -> Magnitudes:
    return lambda size: np.linspace(0.0, share * sides(size)[0], NUM_BINS)


def _bits(most: int) -> Magnitudes:
    return lambda size: np.rint(8 - np.arange(NUM_BINS) * most / (NUM_BINS - 1))


def _space(*, shear: float, right: Magnitudes, down: Magnitudes, turn: float, colour: float, bits: int) -> tuple[Operation, ...]:
    return (
        Operation("Identity", None, False),
        Operation("ShearX", _even(0.0, shear), True),
        Operation("ShearY", _even(0.0, shear), True),
        Operation("TranslateX", right, True),
        Operation("TranslateY", down, True),
        Operation("Rotate", _even(0.0, turn), True),
        Operation("Brightness", _even(0.0, colour), True),
        Operation("Color", _even(0.0, colour), True),
        Operation("Contrast", _even(0.0, colour), True),
        Operation("Sharpness", _even(0.0, colour), True),
        Operation("Posterize", _bits(bits), False),
        Operation("Solarize", _even(1.0, 0.0), False),
        Operation("AutoContrast", None, False),
        Operation("Equalize", None, False),
    )


RAND_AUGMENT = _space(shear=0.3, right=_share_of_width(150.0 / 331.0), down=_share_of_height(150.0 / 331.0), turn=30.0, colour=0.9, bits=4)
TRIVIAL_AUGMENT_WIDE = _space(shear=0.99, right=_even(0.0, 32.0), down=_even(0.0, 32.0), turn=135.0, colour=0.99, bits=6)

_APPLY: dict[str, Callable[[Pixels, float], Pixels]] = {
    "Identity": lambda image, magnitude: image,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": lambda image, magnitude: translate(image, right=int(magnitude)),
    "TranslateY": lambda image, magnitude: translate(image, down=int(magnitude)),
    "Rotate": rotate_nearest,
    "Brightness": lambda image, magnitude: brightness(image, 1 + magnitude),
    "Color": lambda image, magnitude: saturation(image, 1 + magnitude),
    "Contrast": lambda image, magnitude: contrast(image, 1 + magnitude),
    "Sharpness": lambda image, magnitude: sharpness(image, 1 + magnitude),
    "Posterize": lambda image, magnitude: posterize(image, int(magnitude)),
    "Solarize": lambda image, magnitude: solarize(image, 255.0 * magnitude),
    "AutoContrast": lambda image, magnitude: autocontrast(image),
    "Equalize": lambda image, magnitude: equalize(image),
}


def draw_operations(
    space: tuple[Operation, ...],
    samples: Ints,
    *,
    num_ops: int,
    magnitude: int | None,
    image_size: ImageSize,
    seed: int,
    epoch: int,
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Operation numbers and their signed magnitudes, both [B, num_ops]; `magnitude` is a bin, None draws one for each operation."""
    table = np.stack([op.magnitudes(image_size) if op.magnitudes else np.zeros(NUM_BINS) for op in space])
    signed = np.array([op.signed for op in space])
    chosen = np.empty((len(samples), num_ops), np.int64)
    values = np.empty((len(samples), num_ops), np.float64)
    for turn in range(num_ops):
        number = below(np.full(len(samples), len(space)), uniform(samples, seed, epoch, "policy.operation", turn))
        if magnitude is None:
            bins = below(np.full(len(samples), NUM_BINS), uniform(samples, seed, epoch, "policy.magnitude", turn))
        else:
            bins = np.full(len(samples), magnitude)
        negative = signed[number] & (uniform(samples, seed, epoch, "policy.sign", turn) < 0.5)
        chosen[:, turn] = number
        values[:, turn] = np.where(negative, -table[number, bins], table[number, bins])
    return chosen, values


def apply_operation(space: tuple[Operation, ...], number: int, magnitude: float, image: Pixels) -> Pixels:
    """One operation on uint8 [H,W,3]."""
    return _APPLY[space[number].name](image, magnitude)
