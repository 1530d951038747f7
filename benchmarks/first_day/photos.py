"""Made-up photos: JPEGs of about 500 x 375 pixels in ten classes, packed once. Their classes can be learnt: each has a colour and a pattern of its own."""

from __future__ import annotations

import io
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, CHANNELS = 10, 3


def angle(kind: int) -> float:
    """Of a class's stripes. A quarter turn in all, so that a mirrored photo is of no other class."""
    return np.pi / 2 * kind / CLASSES


def photo(number: int) -> bytes:
    """Coarse noise as of a landscape, and over it the stripes of its class; as large a file as a photo of this size."""
    random = np.random.default_rng(number)
    kind = number % CLASSES
    height, width = int(random.integers(333, 420)), int(random.integers(460, 540))
    if random.random() < 0.25:
        height, width = width, height
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = np.mgrid[0:height, 0:width]
    stripes = 60 * np.sin((np.cos(angle(kind)) * rows + np.sin(angle(kind)) * columns) / 6 + 6 * random.random())
    pixels = np.asarray(coarse, dtype=np.float32) * 0.6 + 50
    pixels[..., kind % CHANNELS] += stripes
    pixels += random.normal(0, 6, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write(folder: Path, numbers: range) -> None:
    for number in numbers:
        (folder / f"class_{number % CLASSES}" / f"{number:06}.jpg").write_bytes(photo(number))


def num_validation(count: int) -> int:
    return max(CLASSES, count // 10)


def packed_photos(folder: Path, count: int) -> Path:
    """`folder`/train and `folder`/val, a tenth of them; they are made once. `folder`/images has the same as image folders."""
    from dtl.data.packing.pack import pack

    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    num_val = num_validation(count)
    with ProcessPoolExecutor() as pool:
        jobs = []
        for split, numbers in (("train", range(count - num_val)), ("val", range(count - num_val, count))):
            for number in range(CLASSES):
                (folder / "images" / split / f"class_{number}").mkdir(parents=True)
            for first in range(numbers.start, numbers.stop, 100):
                jobs.append(pool.submit(_write, folder / "images" / split, range(first, min(first + 100, numbers.stop))))
        for job in jobs:
            job.result()
    for split in ("train", "val"):
        pack(folder / "images" / split, folder / split, progress=False)
    (folder / "complete").touch()
    return folder
