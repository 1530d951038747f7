"""Small real image files for the tests of the data layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([127 + 120 * np.sin(x / 7 + y / 11 + seed), 127 + 120 * np.cos(x / 5 - seed), 255 * y / max(height, 1)], -1)
    return (smooth + np.random.default_rng(seed).normal(0, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def picture(seed: int, side: int = 80) -> Image.Image:
    """Seven by seven soft spots of any colour: each seed another picture."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def encoded(kind: str = "JPEG", *, mode: str = "RGB", height: int = 24, width: int = 32, seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(height, width, seed)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_bmp() -> bytes:
    """A small file whose header says 60,000 x 60,000 pixels."""
    data = bytearray(encoded("BMP", height=4, width=4))
    data[18:26] = (60_000).to_bytes(4, "little") * 2
    return bytes(data)


def image_folder(root: Path, classes: dict[str, int], *, kind: str = "JPEG", suffix: str = ".jpg", seed: int = 0) -> Path:
    """`root/CLASS/0000.jpg` ..., all different; `classes` gives the number of images in each."""
    number = seed * 100_000
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for position in range(count):
            (root / name / f"{position:04d}{suffix}").write_bytes(encoded(kind, height=10 + position % 5, width=12, seed=number))
            number += 1
    return root
