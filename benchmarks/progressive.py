"""Small images first: CPU seconds to a top1 on a tenth of CIFAR-10, a network fine-tuned at one size against one that begins with smaller images.

    DTL_DATA=FOLDER DTL_MBV2=FILE python -m benchmarks.progressive [--size 96] [--small 64] [--epochs-small 2] [--target 0.8] [--rounds 3] [--out FILE]

FOLDER holds cifar10_small.tar; FILE is an ImageNet MobileNetV2 by the names of configs/transfer_by_order.yaml. Both ways are
configs/cifar10_finetune.yaml on 5,000 images, validated twice an epoch on the 1,000 test images, and end with the first evaluation at --size that
reaches the target. The second way trains its first epochs on images of --small pixels (`phases.NAME.image_size`). Whole commands in fresh processes,
packing and imports included; each round has another seed.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.judging import ROOT
from benchmarks.measure import Spread, data_folder, interleaved, machine, parser, report, spent, table

GIVE_UP = 8
"""Epochs at the full size."""


def recipe(size: int, small: int | None, epochs_small: float, target: float) -> dict[str, Any]:
    """configs/cifar10_finetune.yaml with these phases."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs/cifar10_finetune.yaml").read_text())
    common = {**found["phases"]["all"], "eval_every": 0.5}
    first = {} if small is None else {"small": {**common, "epochs": epochs_small, "image_size": small}}
    found["phases"] = {**first, "large": {**common, "epochs": GIVE_UP, "image_size": size, "early_stop": {"threshold": target}}}
    found["model"] = {"name": "torchvision/mobilenet_v2"}
    found["transfer"] = {"source": str(Path(os.environ["DTL_MBV2"]).absolute()), "by": "order"}
    return found


def trained(values: dict[str, Any], images: Path, *, seed: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sizes.yaml")
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        command = [sys.executable, "-m", "dtl", "train", "--config", str(file), "--data.train", str(images / "train"), "--data.val", str(images / "test")]
        command += ["--run.seed", str(seed), "--data.workers", "0", "--tracking.wandb", "off", "--tracking.report", "false"]
        used = spent(command, Path(folder), threads=threads)
        phases = json.loads(Path(folder, "runs/sizes/status.json").read_text())["phases"]
        return {"seconds": used.seconds, "cpu_seconds": used.cpu_seconds, "top1": phases[-1]["best"]["value"], "epochs": [phase["epochs"] for phase in phases]}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--size", type=int, default=96)
    made.add_argument("--small", type=int, default=64)
    made.add_argument("--epochs-small", type=float, default=2)
    made.add_argument("--target", type=float, default=0.8)
    made.add_argument("--threads", type=int, default=1)
    options = made.parse_args()
    if "DTL_MBV2" not in os.environ:
        raise SystemExit("set DTL_MBV2; see the top of this file")
    facts, seeds = machine(), dict[str, int]()
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(data_folder() / "cifar10_small.tar") as tar:
            tar.extractall(unpacked, filter="data")

        def way(name: str, small: int | None) -> Any:
            values = recipe(options.size, small, options.epochs_small, options.target)

            def once() -> dict[str, Any]:
                seeds[name] = seeds.get(name, -1) + 1
                return trained(values, Path(unpacked), seed=seeds[name], threads=options.threads)

            return once

        one, two = f"{options.size} pixels", f"{options.small}, then {options.size} pixels"
        results = interleaved({one: way(one, None), two: way(two, options.small)}, options.rounds)
    lines = table(("images", "CPU seconds", "x by CPU", "top1 %", "epochs"), rows(results, options.target))
    report(f"To {100 * options.target:.0f} % by size", lines, results, facts, options.out)


def rows(results: dict[str, list[dict[str, Any]]], target: float) -> list[list[str]]:
    """A line for each way, the first of which the others are compared with."""
    one, found = next(iter(results)), []
    for name, runs in results.items():
        missed = sum(run["top1"] < target for run in runs)
        found.append([
            name, Spread.of([run["cpu_seconds"] for run in runs]).show(0),
            Spread.of([other["cpu_seconds"] / run["cpu_seconds"] for other, run in zip(results[one], runs)]).show(2),
            Spread.of([100 * run["top1"] for run in runs]).show(1) + (f", not reached in {missed} of {len(runs)}" if missed else ""),
            "; ".join(" + ".join(f"{epochs:g}" for epochs in run["epochs"]) for run in runs),
        ])  # fmt: skip
    return found


if __name__ == "__main__":
    main()
