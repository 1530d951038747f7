"""What dtl's training loop costs above the minimal raw loop on the same tensors, in CPU time a step.

    python -m benchmarks.loop [--steps STEPS] [--rounds BLOCKS] [--out FILE]

`dtl train` runs as it always does (its loop, log lines, counting, agreement, heartbeat), only its batches come ready from memory. Within
that one process short blocks of its steps and of raw steps take turns: the raw loop normalises the same uint8 batch (as dtl does: that is
not the loop), computes the loss, goes backward and takes a fused SGD step on a network of its own. One thread. CPU time, since these
machines are shared, and their speed changes by half from second to second: a block lasts 20 ms to half a second, hundreds of them are
paired with their neighbours, and the median difference stands with its 95 % confidence interval (by order statistics).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import machine, parser, report, table, with_interval


def tiny(num_classes: int) -> nn.Module:
    """About a millisecond a step: the loop shows."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, num_classes))


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    image_size: int
    steps: int
    """in a block; there is a log line every 10 steps"""
    rounds: int


CASES = (Case("tiny", "benchmarks.loop:tiny", 32, 10, 600), Case("resnet18", "torchvision/resnet18", 64, 1, 150))
BATCH = 16


RECIPE = """
run: {{dir: {folder}, device: cpu}}
data: {{train: digits, val: digits, cache_dir: {folder}/cache, image_size: {image_size}, global_batch_size: {batch}, workers: 0, last: drop}}
model: {{name: "{model}"}}
phases: {{all: {{train: all, epochs: 1000, eval_every: 1000, lr: 0.0001, schedule: constant}}}}
precision: "{precision}"
tracking: {{wandb: "off"}}
checkpoint: {{every_minutes: 1000}}
"""


class Enough(Exception):
    """The measurement is over."""


def raw_loop(case: Case) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """One step of the plainest loop."""
    from dtl.models.build import build
    from dtl.models.network import Normalise

    network = build(case.model, num_classes=10, own=True)
    module = network.module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)
    normalise = Normalise(network.preprocessing, torch.device("cpu"), channels_last=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        inputs = normalise(images)
        nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_dtl(case: Case, stream: Callable[[list[Any]], Iterator[list[Any]]], *, precision: str = "no") -> None:
    """`dtl train` on what `stream`, given one real step's batches, yields, until that raises Enough."""
    from dtl.config import load_config
    from dtl.training.dataloaders import DataLoaders
    from dtl.training.run import run

    real = DataLoaders.train_steps

    def patched(self: DataLoaders, phase: Any, phase_step: int) -> Iterator[list[Any]]:
        first = real(self, phase, phase_step)
        batches = next(first)
        first.close()  # type: ignore[attr-defined]
        return stream(batches)

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "loop.yaml"
        recipe.write_text(RECIPE.format(folder=folder, model=case.model, image_size=case.image_size, batch=BATCH, precision=precision), encoding="utf-8")
        config, name = load_config(["--config", str(recipe)])
        DataLoaders.train_steps = patched  # type: ignore[method-assign]
        try:
            run(config, name)
        except Enough:
            pass
        finally:
            DataLoaders.train_steps = real  # type: ignore[method-assign]


WARM_UP = 3


def measure(case: Case) -> dict[str, list[float]]:
    """CPU microseconds a step, by block, of both."""
    found: dict[str, list[float]] = {"raw": [], "dtl": []}
    torch.set_num_threads(1)

    def stream(batches: list[Any]) -> Iterator[list[Any]]:
        step = raw_loop(case)
        (batch,) = batches
        for _ in range(WARM_UP + case.rounds):
            start = time.process_time()
            for _ in range(case.steps):
                yield [batch]
            found["dtl"].append(1e6 * (time.process_time() - start) / case.steps)
            start = time.process_time()
            for _ in range(case.steps):
                step(batch.images, batch.labels)
            found["raw"].append(1e6 * (time.process_time() - start) / case.steps)
        raise Enough

    run_dtl(case, stream)
    return {name: values[WARM_UP:] for name, values in found.items()}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rounds=None)
    options.add_argument("--steps", type=int, help="steps in a block")
    chosen = options.parse_args()
    facts, rows, data = machine(), [], []
    for case in CASES:
        case = replace(case, steps=chosen.steps or case.steps, rounds=chosen.rounds or case.rounds)
        found = measure(case)
        above = [ours - raw for ours, raw in zip(found["dtl"], found["raw"])]
        share = [100 * (ours / raw - 1) for ours, raw in zip(found["dtl"], found["raw"])]
        fastest = min(found["dtl"]) - min(found["raw"])
        times = [with_interval(values) for values in (found["raw"], found["dtl"], above)]
        rows.append([case.name, f"{len(above)} x {case.steps}", *times, with_interval(share, 1), f"{fastest:.0f}"])
        data.append({"case": asdict(case), **{way: [round(value, 1) for value in values] for way, values in found.items()}})
    head = ("network", "blocks x steps", "raw, µs a step", "dtl, µs a step", "above raw, µs", "above raw, %", "fastest block above raw's, µs")
    lines = ["Medians and their 95 % confidence intervals.", "", *table(head, rows)]
    report("Training loop", lines, data, facts, chosen.out)


if __name__ == "__main__":
    main()
