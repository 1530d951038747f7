"""The 20-epoch head-only phase on ants and bees: the tutorial's way against dtl, which computes the frozen network's features once.

    DTL_DATA=FOLDER DTL_MBV2=FILE python -m benchmarks.head_only [--epochs 20] [--measured 2] [--views 1 4] [--json FILE]

FOLDER holds hymenoptera_data/{train,val}; FILE is an ImageNet MobileNetV2 by the names of configs/transfer_by_order.yaml. Both sides: 224
pixels, batches of 4, SGD at 0.001 with momentum 0.9, falling to a tenth every 7 epochs, validation after each epoch, the best epoch counts.

The tutorial's way is its code: ImageFolder, DataLoader, random crops and flips, the network in train mode with all but the head frozen.
Of its epochs `--measured` are timed and the median is multiplied (all are run for its accuracy with `--measured 20`); its time has neither
start nor reading the weights. dtl is timed all in, as a command with an empty cache: start, packing, features, training, evaluation, the
model folder, with and without the report's pictures. CPU seconds are those of all processes: they count where the machine has other work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tutorial import ended_cpu_seconds
from benchmarks.tutorial import epochs as tutorial_epochs

ROOT = Path(__file__).resolve().parents[1]


def tutorial(data: Path, weights: Path, *, epochs: int, measured: int, threads: int) -> dict[str, Any]:
    """`measured` epochs of the tutorial's loop; the median stands for all `epochs`."""
    loop = tutorial_epochs(data / "train", data / "val", weights, image_size=224, batch_size=4, lr=0.001, momentum=0.9, decay_every=7, threads=threads)
    times, best = [], 0.0
    for seconds, cpu, top1 in itertools.islice(loop, measured):
        times.append((seconds, cpu))
        best = max(best, top1)
        print(f"  epoch: {seconds:.1f} s, {cpu:.1f} CPU s, best {best:.4f}", file=sys.stderr, flush=True)
    seconds, cpu_spent = (epochs * statistics.median(column) for column in zip(*times))
    return {"way": "tutorial", "seconds": seconds, "cpu_seconds": cpu_spent, "top1": best, "epochs_run": measured}


def with_dtl(data: Path, weights: Path, *, epochs: int, views: int, seed: int, report: bool, threads: int) -> dict[str, Any]:
    """The command, in an empty folder with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "config": ROOT / "configs/ants_bees_features.yaml", "data.train": data, "model.name": "torchvision/mobilenet_v2",
            "transfer.source": weights, "transfer.by": "order", "phases.head.epochs": epochs, "phases.head.views": views,
            "phases.head.cache_features": "true", "run.seed": seed, "run.name": "head", "tracking.report": str(report).lower(),
            "tracking.wandb": "off",
        }  # fmt: skip
        command = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
        command = [str(Path(sys.executable).parent / command[0]), *command[1:], str(ROOT / "dtl/train.py")]
        command += [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        environment = {**os.environ, "DTL_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": str(threads)}
        began, cpu = time.monotonic(), ended_cpu_seconds()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        seconds, cpu_spent = time.monotonic() - began, ended_cpu_seconds() - cpu
        if done.returncode:
            raise SystemExit(done.stderr)
        print("  " + "\n  ".join(line for line in done.stderr.splitlines() if "computed once" in line), file=sys.stderr, flush=True)
        status = json.loads(Path(folder, "runs/head/status.json").read_text())
        phase = status["phases"][-1]
    way = f"dtl, {views} view{'s' if views > 1 else ''}{', with the report' if report else ''}"
    return {"way": way, "seconds": seconds, "cpu_seconds": cpu_spent, "top1": phase["best"]["value"], "phase_seconds": phase["seconds"], "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--measured", type=int, default=2, help="epochs of the tutorial's way that are run")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=1, help="of dtl's runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="dtl with the report at its end, as by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = [name for name in ("DTL_DATA", "DTL_MBV2") if name not in os.environ]
    if missing:
        raise SystemExit(f"set {' and '.join(missing)}; see the top of this file")
    data, weights = Path(os.environ["DTL_DATA"], "hymenoptera_data").absolute(), Path(os.environ["DTL_MBV2"]).absolute()
    common = {"epochs": options.epochs, "threads": options.threads}
    rows = [tutorial(data, weights, measured=options.measured, **common)]
    for views in options.views:
        rows += [with_dtl(data, weights, views=views, seed=seed, report=options.report, **common) for seed in range(options.seeds)]
    base = rows[0]
    for row in rows:
        print(
            f"{row['way']:32} {row['seconds']:7.1f} s ({base['seconds'] / row['seconds']:5.1f}x)  "
            f"{row['cpu_seconds']:7.1f} CPU s ({base['cpu_seconds'] / row['cpu_seconds']:5.1f}x)  top1 {100 * row['top1']:.2f} %"
        )
    if options.json:
        options.json.write_text(json.dumps({"epochs": options.epochs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
