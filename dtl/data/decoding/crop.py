"""Decode only the crop's rectangle of a JPEG, if the native extra (`_jpeg_crop.c`) is built: the same pixels for less work.

If it is not built, is switched off (DTL_NATIVE=0) or does not support an image, `crop_jpeg` returns None, and the caller decodes the whole
image. So a run is the same on machines with and without it. No torch here.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

SWITCH = "DTL_NATIVE"


class Region(NamedTuple):
    """A rectangle of an image that is decoded at 1 / `reduction` (1, 2, 4 or 8) of its size, in pixels of the reduced image."""

    reduction: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Native:
    """Whether the native extra is in use. `summary`: that, and why not; `fault`: it is installed, but cannot be used."""

    on: bool
    summary: str
    fault: bool = False


@functools.cache
def native() -> Native:
    """Checked once in each process, in less than 2 ms."""
    if os.environ.get(SWITCH, "1") == "0":
        return Native(False, f"whole JPEGs are decoded for each crop: {SWITCH}=0 switches the native extra off")
    try:
        _jpeg_crop = importlib.import_module("dtl.data.decoding._jpeg_crop")
    except ModuleNotFoundError:
        return Native(False, "whole JPEGs are decoded for each crop: the native extra was not built (docs/data.md, Speed)")
    except ImportError as error:
        return Native(False, f"whole JPEGs are decoded for each crop: the native extra cannot be loaded ({error})", fault=True)
    if not _agrees():
        return Native(False, "whole JPEGs are decoded for each crop: the libjpeg of the native extra gives other pixels", fault=True)
    number = int(_jpeg_crop.LIBJPEG_TURBO)
    version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
    return Native(True, f"of JPEGs only the crop's rectangle is decoded (libjpeg-turbo {version})")


def crop_jpeg(data: bytes, region: Region, *, height: int, width: int) -> npt.NDArray[np.uint8] | None:
    """Pixels [region.height, region.width, 3] of a JPEG of [height, width] pixels, or None: then decode and check the whole image.

    None also for other formats, for a JPEG that is damaged before the rectangle's end or cut off, and for one of another size.
    """
    return _crop(data, region, height, width) if data[:2] == b"\xff\xd8" and native().on else None


def _crop(data: bytes, region: Region, height: int, width: int) -> npt.NDArray[np.uint8] | None:
    from dtl.data.decoding import _jpeg_crop

    # Of an image smaller than a block, simplejpeg may choose another fraction that rounds to the same size.
    if region.reduction > 1 and min(height, width) < 8:
        return None
    out = np.empty((region.height, region.width, 3), np.uint8)
    done = _jpeg_crop.crop(data, height, width, region.reduction, region.top, region.left, region.height, region.width, out)
    return out if done else None


def _agrees() -> bool:
    """Compare with simplejpeg: another version of libjpeg may round in another way."""
    height, width = 75, 99
    rows, columns = np.indices((height, width))
    picture = np.stack([rows * 3, columns * 2, (rows * columns) % 251], axis=2).astype(np.uint8)
    for chroma in ("444", "422", "420"):
        data = simplejpeg.encode_jpeg(picture, 90, "RGB", chroma)
        for reduction in (1, 2, 4, 8):
            high, wide = -(-height // reduction), -(-width // reduction)
            whole = simplejpeg.decode_jpeg(data, "RGB", min_height=high, min_width=wide)
            top, left = high // 3, wide // 3
            region = Region(reduction, top, left, high // 2, wide // 2)
            part = _crop(data, region, height, width)
            if part is None or not np.array_equal(part, whole[top : top + region.height, left : left + region.width]):
                return False
    return True
