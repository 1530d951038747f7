"""Accuracy on clean test images after labels were flipped, and after what `dtl audit` names was dropped or relabelled.

    DTL_DATA=FOLDER python -m benchmarks.cleaned --weights FILE [--sets flowers,cifar] [--seeds 3] [--share 0.1] [--folder RUNS] [--out FILE]

FOLDER and FILE as for benchmarks.held_out. In each seed a share of the training labels is replaced by another class, drawn uniformly. `dtl audit` looks at
these images with features at 128 pixels; every label that it names gets the action `drop`, or the one that it suggests. The head of configs/features.yaml is
trained on each; test images have their true labels and choose nothing. `clean` has the true training labels: there is no more to be had.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.held_out import prepare
from benchmarks.judging import difference, images
from benchmarks.measure import machine, report, spent, table
from benchmarks.measure import parser as benchmark_parser
from dtl.api import fit

ROOT = Path(__file__).resolve().parents[1]
SETS = {"flowers": ("flowers/train", "flowers/valid"), "cifar": ("cifar/train", "cifar/test")}
IMAGE_SIZE = 128
WAYS = ("flipped", "drop", "relabel", "clean")


def rows_of(folder: Path, place: str) -> list[tuple[str, str]]:
    """(path, label) of each image."""
    return [(str(file.relative_to(folder)), label.name) for label in sorted((folder / place).iterdir()) if label.is_dir() for file in images(label)]


def write_list(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("\n".join(["path,label", *(f"{path},{label}" for path, label in rows)]) + "\n", encoding="utf-8")
    return file


def flipped(rows: list[tuple[str, str]], share: float, seed: int) -> list[tuple[str, str]]:
    drawn, classes = random.Random(f"flip {seed}"), sorted({label for _, label in rows})
    wrong = set(drawn.sample(range(len(rows)), round(share * len(rows))))
    return [(path, drawn.choice([other for other in classes if other != label]) if number in wrong else label) for number, (path, label) in enumerate(rows)]


def decided(file: Path, out: Path, action: str) -> int:
    """audit.csv with `action` for each label that it names: drop, or what it suggests. Returns how many."""
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    named = [row for row in rows if row["kind"] == "label"]
    for row in named:
        row["action"] = "drop" if action == "drop" else row["suggestion"]
    with out.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return len(named)


def measured(folder: Path, name: str, seed: int, share: float, weights: Path) -> list[dict[str, Any]]:
    place, tests = SETS[name]
    rows = rows_of(folder, place)
    noisy = flipped(rows, share, seed)
    file, clean = write_list(folder / f"{name}-{seed}.csv", noisy), write_list(folder / f"{name}-clean.csv", rows)
    test = write_list(folder / f"{name}-test.csv", rows_of(folder, tests))
    network = ["--model", "torchvision/mobilenet_v2", "--weights", str(weights), "--transfer.by", "order", "--data.image-size", str(IMAGE_SIZE)]
    out = folder / f"{name}-{seed}-audit"
    spent([sys.executable, "-m", "dtl", "audit", str(file), *network, "--out", str(out)], folder, threads=2)
    wrong = {path for (path, label), (_, true) in zip(noisy, rows) if label != true}
    found = []
    for way in WAYS:
        given: dict[str, Any] = {"run.name": f"{name}-{seed}-{way}", "run.seed": seed, "run.dir": str(folder / "runs"), "run.device": "cpu", "data.workers": 0}
        given |= {"data.train": str(clean if way == "clean" else file), "data.test": str(test), "data.val_fraction": 0.1, "data.image_size": IMAGE_SIZE}
        given |= {"data.cache_dir": str(folder / "cache"), "tracking.wandb": "off", "tracking.report": "false", "model.name": "torchvision/mobilenet_v2"}
        given |= {"transfer.source": str(weights), "transfer.by": "order"}
        row: dict[str, Any] = {"set": name, "seed": seed, "way": way}
        if way in ("drop", "relabel"):
            given["data.audit"] = str(folder / f"{name}-{seed}-{way}.csv")
            row["named"] = decided(out / "audit.csv", Path(given["data.audit"]), way)
            with (out / "audit.csv").open(encoding="utf-8", newline="") as text:
                row["hits"] = sum(one["kind"] == "label" and one["path"] in wrong for one in csv.DictReader(text))
            row["wrong"] = len(wrong)
        run = fit(str(ROOT / "configs/features.yaml"), given)
        assert run.test is not None
        found.append({**row, **{key: run.test[key] for key in ("top1", "loss", "num_samples")}})
        print(json.dumps(found[-1]), flush=True)
    return found


def lines(found: list[dict[str, Any]]) -> list[list[str]]:
    made = []
    for name in dict.fromkeys(row["set"] for row in found):
        base = {row["seed"]: row for row in found if row["set"] == name and row["way"] == WAYS[0]}
        for way in WAYS:
            some = [row for row in found if row["set"] == name and row["way"] == way]
            change = "" if way == WAYS[0] else difference([row["top1"] - base[row["seed"]]["top1"] for row in some], 100, 1)
            accuracy = 100 * sum(row["top1"] for row in some) / len(some)
            loss = sum(row["loss"] for row in some) / len(some)
            hits = ", ".join(f"{row['hits']} of {row['named']}, {row['wrong']} wrong" for row in some if "named" in row)
            made.append([f"{name}, {len(some)} x {some[0]['num_samples']}", way, f"{accuracy:.1f} %", change, f"{loss:.3f}", hits])
    return made


def main() -> None:
    made = benchmark_parser(__doc__)
    made.add_argument("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    made.add_argument("--sets", default=",".join(SETS))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--share", type=float, default=0.1, help="of the training labels that are flipped")
    made.add_argument("--folder", type=Path, help="where runs lie (default: a temporary folder)")
    options = made.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        prepare(folder)
        found = [
            row
            for name in options.sets.split(",")
            for seed in range(options.seeds)
            for row in measured(folder, name, seed, options.share, options.weights.absolute())
        ]
    columns = ("set, runs x test images", "training labels", "test top1", "change in points (95 %)", "test loss", "named rightly of named, per seed")
    report(f"{100 * options.share:g} % of the training labels flipped, {options.seeds} seeds", table(columns, lines(found)), found, facts, options.out)


if __name__ == "__main__":
    main()
