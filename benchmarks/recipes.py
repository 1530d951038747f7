"""The recipes of configs/, several seeds, on test images that chose nothing: top1 with its range, its 95 % interval and the number of images.

    DTL_DATA=FOLDER python -m benchmarks.recipes --weights FILE [--recipes digits,ants_bees_features] [--seeds 3] [--folder RUNS] [--out FILE]

FOLDER and FILE as for benchmarks.held_out. Each recipe is run with the options that docs/results.md names. The validation images of ants and bees and of
the flowers are test images here, and 20 % (flowers: 15 %) of their training images validate; CIFAR (a tenth of it) has a test set of its own, and 10 %
of its training images validate; of the digits, 20 % of the training images are a test set. What is printed of the test images is of the weights that
the run delivers, by today's default rule (`keep: one_se`); the validation images have chosen them. The interval is Wilson's for one network on so many images.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.held_out import prepare
from benchmarks.measure import cpu_seconds, machine, report, table
from benchmarks.measure import parser as benchmark_parser
from dtl.api import Run, fit
from dtl.intervals import shown, wilson

ROOT = Path(__file__).resolve().parents[1]
Options = Mapping[str, Any]
PLACES: dict[str, Options] = {
    "ants_bees": {"data.train": "hymenoptera_data/train", "data.val_fraction": 0.2, "data.test": "hymenoptera_data/val"},
    "flowers": {"data.train": "flowers/train", "data.val_fraction": 0.15, "data.test": "flowers/valid"},
    "cifar": {"data.train": "cifar"},
    "digits": {"data.train": "digits", "data.test_fraction": 0.2},
}
TINY = {"model.name": "dtl/resnet_tiny"}


@dataclass(frozen=True)
class Row:
    """A recipe, and what is added to its first command beside the data and, unless it starts from none, the weights."""

    recipe: str
    place: str
    options: Options = field(default_factory=dict)
    has_weights: bool = True


ROWS = {
    "digits": Row("digits", "digits", {}, has_weights=False),
    "ants_bees_features": Row("ants_bees_features", "ants_bees"),
    "ants_bees_one_view": Row("ants_bees_features", "ants_bees", {"phases.head.views": 1, "phases.head.cache_features": "true"}),
    "transfer_by_order": Row("transfer_by_order", "ants_bees"),
    "ants_bees_finetune": Row("ants_bees_finetune", "ants_bees", {"data.image_size": 128, "phases.all.epochs": 6, "phases.all.step_epochs": 3}),
    "top_layers": Row("top_layers", "ants_bees", {"data.image_size": 128, "phases.top.epochs": 6}),
    "head_and_backbone_lr": Row("head_and_backbone_lr", "ants_bees", {"data.image_size": 128}),
    "flowers102_two_phase": Row("flowers102_two_phase", "flowers"),
    "flowers102": Row("flowers102", "flowers", {"data.image_size": 96, "phases.head.views": 1, "phases.head.cache_features": "true", "phases.all.epochs": 4}),
    "cifar10_features": Row("cifar10_features", "cifar", {"data.image_size": 96}),
    "cifar10_finetune": Row("cifar10_finetune", "cifar", {"data.image_size": 96, "phases.all.epochs": 3}),
    "supervised_cifar10": Row("supervised_cifar10", "cifar", {**TINY, "phases.all.epochs": 12}, has_weights=False),
    "rotnet_cifar10": Row("rotnet_cifar10", "cifar", {**TINY, "phases.pretext.epochs": 4, "phases.head.epochs": 2, "phases.all.epochs": 6}, has_weights=False),
}


def train(folder: Path, name: str, seed: int, weights: Path) -> Run:
    """One run; nothing where it is finished."""
    row = ROWS[name]
    given: dict[str, Any] = {"run.name": f"{name}-{seed}", "run.seed": seed, "run.dir": str(folder / "runs"), "run.device": "cpu"}
    given |= {"data.workers": 0, "data.cache_dir": str(folder / "cache"), "tracking.wandb": "off", "tracking.report": "false"}
    if row.has_weights:
        given |= {"model.name": "torchvision/mobilenet_v2", "transfer.source": str(weights), "transfer.by": "order"}
    places = (
        PLACES[row.place]
        if row.place == "digits"
        else {key: str(folder / value) if isinstance(value, str) else value for key, value in PLACES[row.place].items()}
    )
    run = fit(ROOT / f"configs/{row.recipe}.yaml", {**given, **places, **row.options})
    assert run.state == "done", run.state
    return run


def cells(name: str, runs: Sequence[Run], seconds: Sequence[float]) -> tuple[str, ...]:
    """A line of the table."""
    row, tests = ROWS[name], [run.test for run in runs]
    added = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in row.options.items())
    tops = [test["top1"] for test in tests if test is not None]
    vals = [phase["val"]["top1"] for run in runs for phase in run.phases[-1:]]
    num_test, num_val = (of["num_samples"] for of in (tests[0] or {}, runs[0].phases[-1]["val"]))
    return (
        f"`{row.recipe}`" + (f", `{added}`" if added else ""),
        f"{ranged(tops)}",
        f"{shown(wilson(statistics.mean(tops), num_test))} % of {num_test:,}",
        f"{ranged(vals)}",
        f"{num_val:,}",
        f"{runs[0].phases[-1]['looks']}",
        f"{min(seconds):.0f} to {max(seconds):.0f}",
    )


def ranged(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    made = benchmark_parser(__doc__)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    add("--recipes", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    add("--seeds", type=int, default=3)
    add("--folder", type=Path, help="where runs lie and are continued (default: a temporary folder)")
    options = made.parse_args()
    facts, lines, data = machine(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        prepare(folder)
        for name in options.recipes.split(","):
            runs, seconds = [], []
            for seed in range(options.seeds):
                before = cpu_seconds()
                runs.append(train(folder, name, seed, options.weights.absolute()))
                seconds.append(cpu_seconds() - before)
            lines.append(cells(name, runs, seconds))
            data.append({"name": name, "phases": [run.phases for run in runs], "test": [run.test for run in runs], "cpu_seconds": seconds})
            print("; ".join(lines[-1]), flush=True)
    columns = (
        "recipe and options",
        f"test top1: mean (range) of {options.seeds} seeds",
        "95 % interval of one run",
        "validation top1",
        "images",
        "looks",
        "CPU seconds",
    )
    report("The recipes on test images that chose nothing", table(columns, lines), data, facts, options.out)


if __name__ == "__main__":
    main()
