"""What memory format, precision, compilation and fused optimizers are worth on this machine: CPU seconds and wall-clock of a training step.

    python -m benchmarks.compute [--network torchvision/resnet18] [--batch 16] [--image-size 224] [--compile] [--rounds 5] [--out FILE]

Each variant trains a copy of one network on the same batch, in turns; the line above the table says which precision `precision: auto` chooses here.
Then one optimizer step on ready gradients: one parameter at a time, foreach, fused; and the loader's uint8 batch made into normalised floats,
as usually written and by dtl (the same bits).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Spread, interleaved, machine, parser, report, table


def training_step(options: Any, device: torch.device, *, channels_last: bool, bf16: bool, compiled: bool = False) -> Callable[[], tuple[float, float]]:
    from dtl.models.build import build

    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module = build(options.network, num_classes=10, own=True).module.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    forward: Any = torch.compile(module) if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=True)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device).to(memory_format=memory_format)
    labels = torch.randint(10, (options.batch,), device=device)

    def step() -> tuple[float, float]:
        """(wall-clock, CPU) seconds"""
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = forward(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    return step


def optimizer_step(options: Any, device: torch.device, **how: bool) -> Callable[[], tuple[float, float]]:
    from dtl.models.build import build

    module = build(options.network, num_classes=10, own=True).module.to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, **how)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)

    def step() -> tuple[float, float]:
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            optimizer.step()
        _wait(device)
        return (time.perf_counter() - wall) / 5, (time.process_time() - cpu) / 5

    return step


def normalising(options: Any, device: torch.device) -> dict[str, Callable[[], tuple[float, float]]]:
    from dtl.models.network import Normalise
    from dtl.models.preprocessing import Preprocessing

    preprocessing = Preprocessing()
    ours = Normalise(preprocessing, device, channels_last=True)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    scale = 1 / std
    shape = (options.batch, options.image_size, options.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)  # channels last in memory

    def usual(batch: torch.Tensor) -> torch.Tensor:
        return batch.to(torch.float32, memory_format=torch.channels_last).sub_(mean).mul_(scale)

    assert torch.equal(usual(images), ours(images))

    def timed(work: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], tuple[float, float]]:
        def step() -> tuple[float, float]:
            _wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(5):
                work(images)
            _wait(device)
            return (time.perf_counter() - wall) / 5, (time.process_time() - cpu) / 5

        return step

    return {"normalising, as usually written": timed(usual), "normalising, dtl": timed(ours)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    from dtl.distributed.launch import read_launch
    from dtl.distributed.runtime import resolve_precision

    made = parser(__doc__)
    made.set_defaults(rounds=5)
    made.add_argument("--network", default="torchvision/resnet18")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--image-size", type=int, default=224)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--compile", action="store_true", help="torch.compile too (a minute and more before its first step)")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, rows, data = machine(), [], {}
    bf16 = resolve_precision("auto", read_launch(), device.type == "cpu") == "bf16"
    ways = {
        "contiguous, float32": training_step(options, device, channels_last=False, bf16=False),
        "channels last, float32": training_step(options, device, channels_last=True, bf16=False),
        "channels last, bf16": training_step(options, device, channels_last=True, bf16=True),
    }
    if options.compile:
        ways["channels last, bf16, compiled"] = training_step(options, device, channels_last=True, bf16=True, compiled=True)
    steps = {
        "SGD, one parameter at a time": optimizer_step(options, device, foreach=False),
        "SGD, foreach": optimizer_step(options, device, foreach=True),
        "SGD, fused": optimizer_step(options, device, fused=True),
    }
    for group in (ways, steps, normalising(options, device)):
        for way in group.values():
            way()  # allocates, compiles
        found = interleaved(group, options.rounds)
        data.update(found)
        first = found[next(iter(group))]
        for name, seconds in found.items():
            times, cpus = ([1000 * one[i] for one in seconds] for i in (0, 1))
            ratio = Spread.of([base[1] / one[1] for base, one in zip(first, seconds)])
            rows.append([name, Spread.of(times).show(1), Spread.of(cpus).show(1), ratio.show(2)])
    lines = [
        f"{options.network}, batch {options.batch}, {options.image_size} pixels, {device}, {options.threads} threads; "
        f"`precision: auto` takes {'bf16' if bf16 else 'no'} here",
        "",
        *table(("a step", "ms", "CPU ms", "x by CPU"), rows),
    ]
    report("Compute", lines, data, facts, options.out)


if __name__ == "__main__":
    main()
