"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) and TrivialAugment Wide (Mueller and Hutter 2021, arXiv 2103.10158).

The operations, their ranges and the 31 magnitude bins are torchvision's; the numbers are drawn for a whole batch by key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dtl.data.transforms import pixels
from dtl.data.transforms.geometry import Ints, Pixels, below
from dtl.keyed import uniform

NUM_BINS = 31


class Operation(NamedTuple):
    """`magnitudes(image_size)` gives the value of each bin, None where the operation has no strength; `signed` ones turn by a coin."""

    name: str
    magnitudes: Callable[[int], npt.NDArray[np.float64]] | None
    signed: bool


def _even(start: float, end: float) -> Callable[[int], npt.NDArray[np.float64]]:
    return lambda size: np.linspace(start, end, NUM_BINS)


def _share_of_size(share: float) -> Callable[[int], npt.NDArray[np.float64]]:
    return lambda size: _even(0.0, share * size)(size)


def _bits(most: int) -> Callable[[int], npt.NDArray[np.float64]]:
    return lambda size: np.rint(8 - np.arange(NUM_BINS) * most / (NUM_BINS - 1))


def _space(*, shear: float, shift: Callable[[int], npt.NDArray[np.float64]], turn: float, colour: float, bits: int) -> tuple[Operation, ...]:
    return (
        Operation("Identity", None, False),
        Operation("ShearX", _even(0.0, shear), True),
        Operation("ShearY", _even(0.0, shear), True),
        Operation("TranslateX", shift, True),
        Operation("TranslateY", shift, True),
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


RAND_AUGMENT = _space(shear=0.3, shift=_share_of_size(150.0 / 331.0), turn=30.0, colour=0.9, bits=4)
TRIVIAL_AUGMENT_WIDE = _space(shear=0.99, shift=_even(0.0, 32.0), turn=135.0, colour=0.99, bits=6)

_APPLY: dict[str, Callable[[Pixels, float], Pixels]] = {
    "Identity": lambda image, magnitude: image,
    "ShearX": pixels.shear_x,
    "ShearY": pixels.shear_y,
    "TranslateX": lambda image, magnitude: pixels.translate(image, right=int(magnitude)),
    "TranslateY": lambda image, magnitude: pixels.translate(image, down=int(magnitude)),
    "Rotate": pixels.rotate_nearest,
    "Brightness": lambda image, magnitude: pixels.brightness(image, 1 + magnitude),
    "Color": lambda image, magnitude: pixels.saturation(image, 1 + magnitude),
    "Contrast": lambda image, magnitude: pixels.contrast(image, 1 + magnitude),
    "Sharpness": lambda image, magnitude: pixels.sharpness(image, 1 + magnitude),
    "Posterize": lambda image, magnitude: pixels.posterize(image, int(magnitude)),
    "Solarize": lambda image, magnitude: pixels.solarize(image, 255.0 * magnitude),
    "AutoContrast": lambda image, magnitude: pixels.autocontrast(image),
    "Equalize": lambda image, magnitude: pixels.equalize(image),
}


def draw_operations(
    space: tuple[Operation, ...],
    samples: Ints,
    *,
    num_ops: int,
    magnitude: int | None,
    image_size: int,
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
    """One operation on uint8 [S,S,3]."""
    return _APPLY[space[number].name](image, magnitude)
