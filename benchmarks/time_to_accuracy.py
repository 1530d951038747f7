"""Time to accuracy, all in: from the command to the stated top1, dtl against the tutorial's own loop, same network, same weights.

    DTL_DATA=FOLDER DTL_MBV2=FILE python -m benchmarks.time_to_accuracy [--cases ants_bees,cifar10,cifar10_same] [--rounds 3] [--out FILE]

FOLDER holds hymenoptera_data/{train,val} and cifar10_small.tar; FILE is an ImageNet MobileNetV2 by the names of configs/transfer_by_order.yaml.
Both sides are commands in fresh processes; each ends with the first epoch whose validation top1 reaches the target: imports, reading the
weights, packing, features, evaluation and leaving are all in dtl's time, and the tutorial's has everything that it does. dtl's caches are empty.
Both learn a new head on the frozen network with SGD and momentum. The tutorial has its published settings (lr 0.001, a tenth every 7
epochs, random crops; batch 4 for ants and bees, 64 for CIFAR), and gives up after 25 epochs; dtl has those of its recipes. In `cifar10_same`
the loop has the recipe's settings instead (no random crops, a constant rate, weight decay, norms that stay as they are, the central crop
that torchvision's weights ask for), so that nothing but the software differs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, data_folder, interleaved, machine, parser, report, spent, table
from benchmarks.tutorial import epochs

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    recipe: str
    train: str
    val: str
    image_size: int
    batch: int
    target: float
    settings: dict[str, Any] = field(default_factory=dict)
    """of the tutorial's loop, where they are not the published ones"""


PUBLISHED = {"lr": 0.001, "momentum": 0.9, "decay_every": 7}
GIVE_UP = 25
CIFAR = ("cifar10_features", "cifar10_small/train", "cifar10_small/test", 96, 64)
CASES = {
    "ants_bees": Case("ants_bees_features", "hymenoptera_data/train", "hymenoptera_data/val", 224, 4, 0.94),
    "cifar10": Case(*CIFAR, 0.70),
    "cifar10_same": Case(*CIFAR, 0.80, {"decay_every": GIVE_UP, "weight_decay": 0.001, "crops": False, "adapting_norms": False, "crop_ratio": 224 / 232}),
}


def with_dtl(case: Case, data: Path, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": ROOT / f"configs/{case.recipe}.yaml", "data.train": data / case.train, "data.val": data / case.val,
            "data.image-size": case.image_size, "model.name": "torchvision/mobilenet_v2", "transfer.source": Path(os.environ["DTL_MBV2"]).absolute(),
            "transfer.by": "order", "phases.head.early-stop.threshold": case.target, "run.name": "head", "tracking.wandb": "off",
            "tracking.report": "false",
        }  # fmt: skip
        launcher = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
        command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(ROOT / "dtl/train.py")]
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        used = spent(command, Path(folder), threads=threads)
        (phase,) = json.loads(Path(folder, "runs/head/status.json").read_text())["phases"]
        return {"seconds": used.seconds, "cpu_seconds": used.cpu_seconds, "top1": phase["best"]["value"], "epochs": phase["epochs"]}


def with_tutorial(name: str, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.time_to_accuracy", "--tutorial", name, "--threads", str(threads)]
        used = spent(command, Path(folder), threads=threads)
    return {"seconds": used.seconds, "cpu_seconds": used.cpu_seconds, **json.loads(used.output.splitlines()[-1])}


def tutorial(case: Case, data: Path, threads: int) -> dict[str, Any]:
    """Runs until the target is reached."""
    loop = epochs(
        data / case.train, data / case.val, Path(os.environ["DTL_MBV2"]), image_size=case.image_size, batch_size=case.batch, threads=threads,
        **{**PUBLISHED, **case.settings},
    )  # fmt: skip
    seen: list[float] = []
    for _, _, top1 in itertools.islice(loop, GIVE_UP):
        seen.append(top1)
        if top1 >= case.target:
            break
    return {"top1": max(seen), "epochs": len(seen), "each": seen}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--cases", default=",".join(CASES))
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tutorial", help="(used by itself) run the tutorial's loop on this case")
    options = made.parse_args()
    if "DTL_MBV2" not in os.environ:
        raise SystemExit("set DTL_MBV2; see the top of this file")
    data = data_folder().absolute()
    with tempfile.TemporaryDirectory() as unpacked:
        # CIFAR's images lie in a tar: unpacked beside links to the other sets, before anything is timed.
        if "DTL_UNPACKED" in os.environ:
            data = Path(os.environ["DTL_UNPACKED"])
        else:
            for path in data.iterdir():
                Path(unpacked, path.name).symlink_to(path)
            if "cifar10" in options.cases:
                with tarfile.open(data / "cifar10_small.tar") as tar:
                    tar.extractall(Path(unpacked, "cifar10_small"), filter="data")
            os.environ["DTL_UNPACKED"] = unpacked
            data = Path(unpacked)
        if options.tutorial:
            print(json.dumps(tutorial(CASES[options.tutorial], data, options.threads)))
            return
        facts, rows, results = machine(), [], {}
        for name in options.cases.split(","):
            case = CASES[name]
            ways: dict[str, Callable[[], Any]] = {
                "the tutorial's loop": lambda name=name: with_tutorial(name, options.threads),  # type: ignore[misc]
                "dtl": lambda case=case: with_dtl(case, data, options.threads),  # type: ignore[misc]
            }
            found = results[name] = interleaved(ways, options.rounds)
            base = found["the tutorial's loop"]
            for way, runs in found.items():
                missed = sum(run["top1"] < case.target for run in runs)
                times = [Spread.of([other[key] / run[key] for other, run in zip(base, runs)]).show(1) for key in ("seconds", "cpu_seconds")]
                rows.append([
                    f"{name}, {100 * case.target:.0f} %", way + ("" if way == "dtl" or not case.settings else ", the recipe's settings"),
                    Spread.of([run["seconds"] for run in runs]).show(1), times[0], Spread.of([run["cpu_seconds"] for run in runs]).show(1), times[1],
                    Spread.of([100 * run["top1"] for run in runs]).show(1) + (f", not reached in {missed} of {len(runs)}" if missed else ""),
                    Spread.of([run["epochs"] for run in runs]).show(0),
                ])  # fmt: skip
    head = ("to", "way", "seconds", "x", "CPU seconds", "x by CPU", "top1 %", "epochs")
    report("Time to accuracy", table(head, rows), results, facts, options.out)


if __name__ == "__main__":
    main()
