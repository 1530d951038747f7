"""What the pixels are worth: 12 bits against 8, five channels against three, and what the network sees of wide images.

    DTL_DATA=FOLDER python -m benchmarks.pixels --folder RUNS --weights MBV2 [--only twelve|five|wide|crops]

FOLDER holds hymenoptera_data (ants and bees), MBV2 MobileNetV2's ImageNet weights in the order of torchvision's. All sets are made of these photos.

twelve: gray images of 8 bits, and of 12 bits in PNGs of 16 (the luma in floating point, times 16): the head on frozen features.
five: RGB, and five channels in .npy (RGB, the strength of edges and the saturation; or RGB, luma and blurred luma), all 256 pixels on the short side: the
    head on frozen features.
wide: noise of 600 x 200, a block in its left fifth decides the class. crop, stretch and pad, the head alone and fine-tuned with two presets of
    augmentations, at 128 pixels.
crops: how much of that block the random crops of training show; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.measure import data_folder, machine, report, table
from dtl.config.models import AugmentConfig, Fit
from dtl.data.transforms.transforms import train_transform

ROOT = Path(__file__).resolve().parents[1]
Preset = Literal["imagenet", "light"]
Write = Callable[[Path, Image.Image], None]


def photos(split: str) -> list[Path]:
    return sorted(path for path in (data_folder() / "hymenoptera_data" / split).glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))


def make(folder: Path, write: Write) -> Path:
    """The same photos, written otherwise; once."""
    if not folder.exists():
        for split in ("train", "val"):
            for path in photos(split):
                (folder / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                write(folder / split / path.parent.name / path.stem, Image.open(path).convert("RGB"))
    return folder


def luma(image: Image.Image) -> np.ndarray:
    """0 to 255, with its fractions."""
    return np.asarray(image, np.float64) @ (0.299, 0.587, 0.114)


def write_gray(stem: Path, image: Image.Image) -> None:
    Image.fromarray(np.rint(luma(image)).astype(np.uint8)).save(f"{stem}.png")


def write_twelve_bits(stem: Path, image: Image.Image) -> None:
    Image.fromarray(np.rint(16 * luma(image)).astype(np.uint16)).save(f"{stem}.png")


def small(image: Image.Image) -> Image.Image:
    scale = 256 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS) if scale < 1 else image


def write_rgb(stem: Path, image: Image.Image) -> None:
    small(image).save(f"{stem}.png")


def write_five(stem: Path, image: Image.Image) -> None:
    rgb = np.asarray(small(image))
    down, right = np.gradient(luma(small(image)))
    edges = np.minimum(4 * np.hypot(down, right), 255)
    saturation = rgb.max(axis=2) - rgb.min(axis=2)
    np.save(f"{stem}.npy", np.concatenate([rgb, edges[..., None].astype(np.uint8), saturation[..., None]], axis=2))


def write_five_gray(stem: Path, image: Image.Image) -> None:
    blurred = np.asarray(small(image).convert("L").filter(ImageFilter.GaussianBlur(3)))
    np.save(f"{stem}.npy", np.concatenate([small(image), np.rint(luma(small(image))).astype(np.uint8)[..., None], blurred[..., None]], axis=2))


def make_wide(folder: Path) -> Path:
    """200 training and 100 validation images of 600 x 200, noise; a white or a black block of 80 x 80 pixels somewhere in the left fifth."""
    if folder.exists():
        return folder
    for split, count in (("train", 200), ("val", 100)):
        rng = np.random.default_rng(len(split))
        for number in range(count):
            name = ("black", "white")[number % 2]
            image = Image.fromarray(rng.integers(60, 200, (200, 600, 3)).astype(np.uint8))
            left, top = int(rng.integers(2, 38)), int(rng.integers(2, 118))
            ImageDraw.Draw(image).rectangle((left, top, left + 80, top + 80), fill=name)
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / name / f"{number:03d}.png")
    return folder


def crops(preset: Preset, fit: Fit, num: int = 20_000) -> list[object]:
    """A row: of random crops of the wide images, the shares in percent that show nothing of the block (under 5 % of it), and at least half of it."""
    rng, transform = np.random.default_rng(0), train_transform(image_size=128, augment=AugmentConfig(preset=preset), fit=fit)
    places = np.stack([rng.integers(2, 118, num), rng.integers(2, 38, num)], axis=1)
    drawn = transform.draw(np.arange(num), np.full(num, 600), np.full(num, 200), seed=0, epoch=0).placement
    scale = drawn.boxes[:, 2:] / drawn.resized
    begin = drawn.boxes[:, :2] + np.maximum(drawn.offsets, 0) * scale
    end = drawn.boxes[:, :2] + np.minimum(drawn.offsets + 128, drawn.resized) * scale
    sides = np.maximum(np.minimum(end, places + 80) - np.maximum(begin, places), 0)
    shown = sides.prod(axis=1) / 80**2
    return [f"{preset}, {fit}", round(100 * float((shown < 0.05).mean())), round(100 * float((shown >= 0.5).mean())), ""]


def train(folder: Path, name: str, recipe: str, images: Path, weights: Path, *options: str) -> list[object]:
    """A row: the run, its accuracy in percent, the interval of that, and the line about what evaluation sees."""
    log = folder / f"{name}.log"
    if not (folder / "runs" / name / "model/model.json").exists():
        command = [sys.executable, "-m", "dtl", "train", "--config", str(ROOT / f"configs/{recipe}.yaml"), "--run.name", name, "--data.train", str(images)]
        command += ["--model.name", "torchvision/mobilenet_v2", "--transfer.source", str(weights), "--transfer.by", "order"]
        command += ["--tracking.wandb", "off", "--tracking.report", "false", *options]
        print(f"{name}: {' '.join(command[2:])}", flush=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with log.open("w") as file:
            subprocess.run(command, cwd=folder, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)
    stored = json.loads((folder / "runs" / name / "model/model.json").read_text())["metrics"]
    low, high = stored["top1_interval"]
    seen = next((line for line in log.read_text().splitlines() if "evaluation sees" in line), "")
    row = [name, round(100 * stored["top1"], 1), f"{100 * low:.1f} to {100 * high:.1f}", seen]
    print(row, flush=True)
    return row


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write FILE.md and FILE.json")
    made.add_argument("--folder", type=Path, required=True, help="where the images are made and the runs lie")
    made.add_argument("--weights", type=Path, required=True, help="ImageNet weights of MobileNetV2")
    made.add_argument("--only", choices=("twelve", "five", "wide", "crops"))
    made.add_argument("--recipes", nargs="+", choices=("features", "finetune"), default=["features", "finetune"], help="of wide")
    options = made.parse_args()
    facts, folder, weights = machine(), options.folder.absolute(), options.weights.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    if options.only in (None, "twelve"):
        for name, write in (("gray-8-bits", write_gray), ("gray-12-bits", write_twelve_bits)):
            rows.append(train(folder, name, "features", make(folder / name, write), weights))
    if options.only in (None, "five"):
        rows.append(train(folder, "rgb", "features", make(folder / "rgb", write_rgb), weights))
        rows.append(train(folder, "five-edges", "features", make(folder / "five", write_five), weights, "--data.channels", "5"))
        rows.append(train(folder, "five-gray", "features", make(folder / "five-gray", write_five_gray), weights, "--data.channels", "5"))
    if options.only == "crops":
        presets: tuple[Preset, ...] = ("imagenet", "light")
        fits: tuple[Fit, ...] = ("crop", "stretch", "pad")
        rows = [crops(preset, fit) for preset in presets for fit in fits]
        return report("crops", table(("preset, data.fit", "none of the block, %", "half of it or more, %", ""), rows), rows, facts, options.out)
    if options.only in (None, "wide"):
        images = make_wide(folder / "wide")
        for recipe in options.recipes:
            for preset in ("imagenet", "light")[: 2 if recipe == "finetune" else 1]:
                for fit in ("crop", "stretch", "pad"):
                    # Fine-tuning every layer takes minutes: smaller images, and half of the recipe's epochs.
                    more = ["128"] if recipe == "features" else ["64", "--phases.all.epochs", "5", "--data.augment.preset", preset]
                    name = "-".join(["wide", recipe, fit, *([] if recipe == "features" else [preset])])
                    rows.append(train(folder, name, recipe, images, weights, "--data.fit", fit, "--data.image-size", *more))
    columns = ("run", "top1 in %", "95 % interval", "what it says")
    report("pixels", table(columns, rows), rows, facts, options.out)


if __name__ == "__main__":
    main()
