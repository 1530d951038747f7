"""Few labels: does the rotation pretext task on all images help? Against the same training from scratch, several seeds of each.

    DTL_DATA=FOLDER python -m benchmarks.few_labels --folder RUNS [--network dtl/resnet_tiny] [--pretext-epochs 8] [--labels 30]
        [--epochs 30] [--lr 0.05 0.01] [--seeds 3] [--pretext RUN]

FOLDER holds cifar10_small.tar ({train,test}/CLASS/*.png). One pretext run learns the rotations of all training images, without labels.
Then each seed draws its own LABELS images a class and trains on these alone, from scratch and from the pretext run's weights, at each rate:
the same epochs, batches and evaluations (every third epoch, on all test images; the best counts, for all alike). `frozen` trains a head
on the pretext network, on as many augmented views as epochs. Runs lie in RUNS/runs and go on where they were cut off; RUNS/comparison
has the curves. `--pretext` takes a finished run instead of training one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import cpu_seconds, data_folder, machine, report, table

ROOT = Path(__file__).resolve().parents[1]


def draw_lists(folder: Path, *, seeds: int, labels: int) -> None:
    """cifar/few-SEED.csv: `labels` images of each class, other ones for each seed."""
    for seed in range(seeds):
        drawn, rows = random.Random(seed), ["path,label"]
        for kind in sorted(path for path in (folder / "cifar/train").iterdir()):
            files = sorted(kind.iterdir())
            rows += [f"train/{kind.name}/{file.name},{kind.name}" for file in drawn.sample(files, labels)]
        (folder / f"cifar/few-{seed}.csv").write_text("\n".join(rows) + "\n")


def train(folder: Path, name: str, recipe: str, *options: str) -> None:
    """`dtl train` of a recipe in `folder`; nothing where the run is finished."""
    status = folder / "runs" / name / "status.json"
    if status.exists() and json.loads(status.read_text())["state"] == "done":
        return
    command = [sys.executable, "-m", "dtl", "train", "--config", str(ROOT / f"configs/{recipe}.yaml"), "--run.name", name, "--data.val", "cifar/test"]
    command += ["--data.workers", "0", "--tracking.wandb", "off", "--tracking.report", "false", *options]
    before = cpu_seconds()
    print(f"{name}: {' '.join(command[2:])}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    print(f"{name}: best top1 {100 * best(folder, name):.1f} %, {cpu_seconds() - before:.0f} CPU seconds", flush=True)


def best(folder: Path, name: str) -> float:
    events = map(json.loads, (folder / "runs" / name / "history.jsonl").read_text().splitlines())
    return max(float(event["top1"]) for event in events if event["event"] == "val")


def arms(folder: Path, pretext: str, *, network: str, epochs: int, rates: Sequence[float], seed: int) -> None:
    """The runs of one seed."""
    common = ["--data.train", f"cifar/few-{seed}.csv", "--model.name", network, "--data.global-batch-size", "25", "--run.seed", str(seed)]
    common += ["--phases.all.epochs", str(epochs), "--phases.all.eval-every", "3"]
    for lr in rates:
        rate = ["--phases.all.lr", f"{lr:g}"]
        train(folder, f"pretext-{lr:g}-s{seed}", "supervised_cifar10", *common, *rate, "--transfer.source", pretext)
        train(folder, f"scratch-{lr:g}-s{seed}", "supervised_cifar10", *common, *rate)
    head = ["--phases.all.lr", f"{max(rates):g}", "--phases.all.train", "head", "--phases.all.views", str(epochs)]
    train(folder, f"frozen-s{seed}", "supervised_cifar10", *common, *head, "--transfer.source", pretext)


def rows(folder: Path, *, rates: Sequence[float], seeds: int) -> list[tuple[str, ...]]:
    """A line an arm: its name, each seed's best, the mean."""
    found = []
    for arm in (*(f"{kind}-{lr:g}" for lr in rates for kind in ("pretext", "scratch")), "frozen"):
        values = [100 * best(folder, f"{arm}-s{seed}") for seed in range(seeds)]
        found.append((arm, *(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}"))
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--out", type=Path, help="write FILE.md and FILE.json")
    add("--folder", type=Path, required=True, help="where the images are unpacked and the runs lie")
    add("--network", default="dtl/resnet_tiny")
    add("--pretext", metavar="RUN", help="a finished pretext run of that network")
    add("--pretext-epochs", type=int, default=8)
    add("--labels", type=int, default=30)
    add("--epochs", type=int, default=30)
    add("--lr", type=float, nargs="+", default=[0.05, 0.01])
    add("--seeds", type=int, default=3)
    options = made.parse_args()
    facts, folder = machine(), options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cifar").exists():
        with tarfile.open(data_folder() / "cifar10_small.tar") as tar:
            tar.extractall(folder / "cifar", filter="data")
    draw_lists(folder, seeds=options.seeds, labels=options.labels)
    pretext = options.pretext
    if pretext is None:
        pretext = "runs/rotations"
        learn = ["--data.train", "cifar/train", "--model.name", options.network, "--data.global-batch-size", "32"]
        learn += ["--phases.pretext.epochs", str(options.pretext_epochs), "--phases.pretext.eval-every", "4"]
        train(folder, "rotations", "rotnet_pretext", *learn)
    for seed in range(options.seeds):
        arms(folder, pretext, network=options.network, epochs=options.epochs, rates=options.lr, seed=seed)
    found = rows(folder, rates=options.lr, seeds=options.seeds)
    names = [f"runs/{row[0]}-s{seed}" for row in found for seed in range(options.seeds)]
    subprocess.run([sys.executable, "-m", "dtl", "report", *names, "--out", "comparison"], cwd=folder, check=True)
    columns = ("top1 in %", *(f"seed {seed}" for seed in range(options.seeds)), "mean")
    report(f"{options.labels} labels a class", table(columns, found), [list(row) for row in found], facts, options.out)


if __name__ == "__main__":
    main()
