"""Draw docs/images/fits.jpg: a photo, and what evaluation sees of it with each `data.fit`; below, random crops of training with each.

    python -m benchmarks.fits [--out FILE] [--quality 85]

The photo is scikit-learn's china.jpg (by danielbuechele, CC BY 2.0, https://www.flickr.com/photos/danielbuechele/6061409035), cut to a panorama.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dtl.config.models import AugmentConfig, Fit
from dtl.data.transforms.transforms import Transform, eval_transform, train_transform

SIZE, GAP, TEXT = 160, 10, 24
FITS: tuple[Fit, ...] = ("crop", "stretch", "pad")


def photo() -> Image.Image:
    from sklearn.datasets import load_sample_image  # type: ignore[import-untyped]

    return Image.fromarray(load_sample_image("china.jpg")).crop((0, 60, 640, 340))


def view(image: Image.Image, transform: Transform, sample: int = 0) -> Image.Image:
    """As the network sees it."""
    pixels = np.asarray(image)
    out = torch.empty((3, SIZE, SIZE), dtype=torch.uint8)
    transform.apply(pixels, transform.draw([sample], [image.width], [image.height], seed=0, epoch=0), 0, out)
    return Image.fromarray(out.permute(1, 2, 0).numpy())


def draw(image: Image.Image) -> Image.Image:
    """A column for each fit, beside the photo: what evaluation sees, and three random crops."""
    rows = [[view(image, eval_transform(image_size=SIZE, fit=fit)) for fit in FITS]]
    rows += [[view(image, train_transform(image_size=SIZE, augment=AugmentConfig(), fit=fit), sample) for fit in FITS] for sample in (0, 3)]
    left = round(SIZE * image.width / image.height)
    page = Image.new("RGB", (left + 3 * (SIZE + GAP), TEXT + len(rows) * (SIZE + GAP) - GAP), "white")
    pen = ImageDraw.Draw(page)
    page.paste(image.resize((left, SIZE)), (0, TEXT))
    pen.text((0, 4), f"the photo, {image.width}x{image.height}", "black")
    pen.text((0, TEXT + SIZE + GAP), "right: evaluation; below: training (random crops)", "black")
    for column, fit in enumerate(FITS):
        at = left + GAP + column * (SIZE + GAP)
        pen.text((at, 4), f"data.fit {fit}", "black")
        for row, tiles in enumerate(rows):
            page.paste(tiles[column], (at, TEXT + row * (SIZE + GAP)))
    return page


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs/images/fits.jpg")
    made.add_argument("--quality", type=int, default=85, help="of the JPEG")
    options = made.parse_args()
    draw(photo()).save(options.out, quality=options.quality)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
