"""What `dtl audit` finds of copies that were planted: of 160 photos 40 each are recompressed, cropped by 5 %, mirrored and made brighter.

    DTL_DATA=FOLDER python -m benchmarks.planted --weights FILE [--images 160] [--seed 1] [--scenes] [--out FILE]

FOLDER and FILE as for benchmarks.held_out. The photos are those of flowers/valid and hymenoptera_data/val; their copies lie in another split. A copy is found
where audit.csv names it beside its own photo, and says that it is the same photo. `other pairs` are all that it names besides, true or not: look at them.

With --scenes instead: 1,000 training images of CIFAR-10, and "next shots" made of some (turned by up to 8 degrees, moved by up to a tenth, darker or brighter
by up to a fifth). What is named at several thresholds; the default one is chosen by it.
"""

from __future__ import annotations

import csv
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

from benchmarks.held_out import prepare
from benchmarks.measure import data_folder, machine, report, spent, table
from benchmarks.measure import parser as benchmark_parser

THRESHOLDS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
SIDE, MARGIN = 128, 16
KINDS = ("JPEG of quality 50", "cropped by 5 %", "mirrored", "1.3 times as bright")


def changed(image: Image.Image, kind: str) -> Image.Image:
    if kind == "cropped by 5 %":
        width, height = image.size
        return image.crop((int(0.025 * width), int(0.025 * height), int(0.975 * width), int(0.975 * height)))
    if kind == "mirrored":
        return ImageOps.mirror(image)
    return ImageEnhance.Brightness(image).enhance(1.3) if kind == "1.3 times as bright" else image


def plant(folder: Path, number: int, seed: int) -> dict[tuple[str, str], str]:
    """`train` with the photos and `val` with copies of some, in two classes. Returns the kind of each (photo, copy)."""
    photos = [(label, path) for label in ("flowers/valid", "hymenoptera_data/val") for path in sorted((data_folder() / label).rglob("*.jpg"))]
    planted = {}
    for place, (label, path) in enumerate(photos):
        (folder / "train" / label.partition("/")[0]).mkdir(parents=True, exist_ok=True)
        (folder / "train" / label.partition("/")[0] / f"{place:03d}.jpg").write_bytes(path.read_bytes())
    for count, place in enumerate(random.Random(seed).sample(range(len(photos)), number)):
        kind, name = KINDS[count % len(KINDS)], photos[place][0].partition("/")[0]
        (folder / "val" / name).mkdir(parents=True, exist_ok=True)
        with Image.open(photos[place][1]) as image:
            changed(image.convert("RGB"), kind).save(folder / "val" / name / f"{place:03d}.jpg", quality=50 if kind == KINDS[0] else 85)
        planted[f"train/{name}/{place:03d}.jpg", f"val/{name}/{place:03d}.jpg"] = kind
    return planted


def found(file: Path, planted: dict[tuple[str, str], str]) -> tuple[dict[str, int], list[str]]:
    """How many of each kind audit.csv names, and its other pairs."""
    with file.open(encoding="utf-8", newline="") as text:
        pairs = {(row["path"], row["other"]): row for row in csv.DictReader(text) if row["kind"].startswith("same ")}
    named = {tuple(sorted(pair)) for pair, row in pairs.items() if row["kind"] == "same photo"}
    counts = {kind: sum(pair in named for pair, own in planted.items() if own == kind) for kind in KINDS}
    return counts, [f"{first} {second} {row['kind']} {row['score']}" for (first, second), row in pairs.items() if tuple(sorted((first, second))) not in planted]


def shoot(folder: Path, number: int, seed: int) -> set[str]:
    """100 images of each class of CIFAR-10 in `folder`/photos/train, and next shots of `number` of them in val; returns the names of the shots' photos."""
    prepare(folder)
    draw = random.Random(seed)
    files = sorted(file for label in sorted((folder / "cifar/train").iterdir()) for file in sorted(label.glob("*.png"))[:100])
    again = set(draw.sample(files, number))
    for file in files:
        with Image.open(file) as image:
            wide = image.convert("RGB").resize((SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), Image.Resampling.LANCZOS)
        turned = wide.rotate(draw.uniform(-8, 8), Image.Resampling.BICUBIC)
        x, y, light = MARGIN + draw.randint(-13, 13), MARGIN + draw.randint(-13, 13), draw.uniform(0.8, 1.2)
        for split, shot in (("train", wide.crop((MARGIN, MARGIN, MARGIN + SIDE, MARGIN + SIDE))), ("val", turned.crop((x, y, x + SIDE, y + SIDE)))):
            if split == "train" or file in again:
                to = folder / "photos" / split / file.parent.name / f"{file.stem}.jpg"
                to.parent.mkdir(parents=True, exist_ok=True)
                (shot if split == "train" else ImageEnhance.Brightness(shot).enhance(light)).save(to, quality=90)
    shutil.rmtree(folder / "cifar")
    return {f"{file.parent.name}/{file.stem}.jpg" for file in again}


def scenes(folder: Path, weights: Path, number: int, seed: int) -> list[dict[str, float]]:
    """For each threshold the shares of the shots that are named with their photo, and of the training images that are named with another image."""
    shots, network = shoot(folder, number, seed), ["--model", "torchvision/mobilenet_v2", "--weights", str(weights)]
    spent([sys.executable, "-m", "dtl", "audit", "photos", *network, "--threshold", str(THRESHOLDS[0])], folder, threads=2)
    with (folder / "audit/audit.csv").open(encoding="utf-8", newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["kind"].startswith(("same ", "two "))]
    found = []
    for threshold in THRESHOLDS:
        known = [row for row in rows if row["kind"] != "same scene" or float(row["score"]) >= threshold]
        pairs = [tuple(row[name].partition("/")[2] for name in ("path", "other")) for row in known]
        own = {first for first, second in pairs if first == second}
        others = {name for first, second in pairs if first != second for name in (first, second)}
        found.append({"threshold": threshold, "shots": len(own & shots) / number, "images": len(others) / 1000})
    return found


def main() -> None:
    made = benchmark_parser(__doc__)
    made.add_argument("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    made.add_argument("--images", type=int, default=160, help="photos that are planted again")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--scenes", action="store_true", help="next shots made of CIFAR-10, at several thresholds")
    options = made.parse_args()
    if options.scenes:
        with tempfile.TemporaryDirectory() as temporary:
            known = scenes(Path(temporary), options.weights.absolute(), options.images, options.seed)
        shares = [[f"{row['threshold']:g}", f"{row['shots']:.1%}", f"{row['images']:.1%}"] for row in known]
        lines = table(("threshold", f"named of {options.images} next shots", "of 1,000 images named with another"), shares)
        report("Scenes by their features, of CIFAR-10", lines, known, machine(), options.out)
        return
    facts, rows, data, pairs = machine(), [], [], list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        planted = plant(folder / "photos", options.images, options.seed)
        for name, more in (("with weights", ["--model", "torchvision/mobilenet_v2", "--weights", str(options.weights.absolute())]), ("without", [])):
            words = [sys.executable, "-m", "dtl", "audit", "photos", *more, "--out", name.replace(" ", "-")]
            seconds = spent(words, folder, threads=2).cpu_seconds
            counts, others = found(folder / name.replace(" ", "-") / "audit.csv", planted)
            rows.append([name, *(f"{counts[kind]} of {sum(own == kind for own in planted.values())}" for kind in KINDS), len(others), f"{seconds:.0f}"])
            data.append({"way": name, **counts, "others": others, "cpu_seconds": seconds})
            pairs += [f"other pair, {name}: {pair}" for pair in others]
    columns = ("dtl audit", *KINDS, "other pairs", "CPU seconds")
    lines = [*table(columns, rows), "", *pairs]
    report(f"Copies planted in photos: {options.images} of them found again", lines, data, facts, options.out)


if __name__ == "__main__":
    main()
