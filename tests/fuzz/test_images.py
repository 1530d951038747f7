"""Damaged images of every format: pixels or DecodeError, in little time and memory."""

from __future__ import annotations

import io

import numpy as np
from mutations import bounded, fuzzed, mutated, one_line
from PIL import Image

from dtl.data.decoding.decode import DecodeError, Region, crop_jpeg, decode, is_plain_jpeg, probe
from dtl.data.decoding.headers import lean, without_exif

_PIXELS = np.stack([*np.indices((40, 56)), np.arange(40 * 56).reshape(40, 56)], axis=2).astype(np.uint8)
_LIMIT = 1 << 20


def _encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(_PIXELS).convert(mode).save(out, kind, **options)
    return out.getvalue()


_EXIF = Image.Exif()
_EXIF[0x0112] = 6
_IMAGES = [
    _encoded("JPEG"), _encoded("JPEG", progressive=True, exif=_EXIF, comment=b"x" * 99), _encoded("JPEG", "L"), _encoded("JPEG", "CMYK"),
    _encoded("PNG"), _encoded("PNG", "P"), _encoded("PNG", "RGBA", icc_profile=bytes(200)), _encoded("GIF", "P", comment=b"y" * 300),
    _encoded("WEBP"), _encoded("WEBP", "RGBA", lossless=True), _encoded("TIFF"), _encoded("TIFF", compression="tiff_lzw", exif=_EXIF),
    _encoded("TIFF", compression="jpeg"), _encoded("TIFF", "1", compression="group4"), _encoded("BMP"), _encoded("BMP", "P"), _encoded("PPM"),
    b"P2\n3 2\n15\n1 2 3\n4 5 6\n", b"P6\n2 2\n1023\n" + bytes(24),
]  # fmt: skip


@fuzzed(mutated(_IMAGES), 150)
def test_damaged_images(data: bytes) -> None:
    with bounded(megabytes=64):
        for read in (probe, decode, lean):
            try:
                read(data, max_pixels=_LIMIT)
            except DecodeError as error:
                one_line(error)
        if is_plain_jpeg(data, _LIMIT):
            without_exif(data)
        crop_jpeg(data, Region(1, 3, 5, 16, 20), height=40, width=56)
