"""dtl's training loop and others, in turns in one process, on the same tensors: what benchmarks.scaling and benchmarks.first_day measure with.

`dtl train` runs as it always does (agreement at each step, heartbeat, log lines, counting), only its batches come ready from pinned memory. Between
blocks of its steps the other loops take as many of their own, on networks of their own. All blocks are short, and each is compared with those beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

DTL, BARE, STATIC, TIMM, TORCHVISION = "dtl", "bare loop", "bare loop, static graph", "timm's train.py", "torchvision's train.py"
Step = Callable[[Tensor, Tensor], None]
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One measurement. `batch` is a rank's; a block has `steps` steps; the first of `rounds` + 1 warms up."""

    network: str
    batch: int
    image_size: int
    steps: int
    rounds: int
    device: str = "cuda"
    precision: str = "no"
    channels_last: bool = True
    compiled: bool = False
    gradient_compression: str = "no"
    others: tuple[str, ...] = (BARE,)


@dataclass
class Found:
    """Seconds a step by loop, and what a step adds to the memory in use on the device, in GiB: this rank's."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class Enough(Exception):
    """The measurement is over."""


RECIPE = """
run: {{dir: "{folder}/runs", device: {device}, gradient_compression: "{compression}"}}
data: {{train: "{images}", val_fraction: 0.1, cache_dir: "{folder}/cache", image_size: {size}, workers: 0,
  global_batch_size: {batch}, micro_batch_size: {micro}, last: drop}}
model: {{name: "{network}", sync_bn: false, channels_last: {channels_last}, compile: {compiled}}}
phases: {{all: {{train: all, epochs: 1000, eval_every: 1000, lr: 0.0001, schedule: constant}}}}
precision: "{precision}"
tracking: {{wandb: "off", report: false}}
checkpoint: {{every_minutes: 1000}}
"""


def tiny_images(folder: Path, at_least: int) -> Path:
    """An image folder that is large enough for a global batch of `at_least`; what is on the images does not matter."""
    if not (folder / "complete").exists():
        random = np.random.default_rng(0)
        for number in range(at_least + at_least // 4 + 4 * CLASSES):
            place = folder / "images" / f"class_{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{number}.png")
        (folder / "complete").touch()
    return folder / "images"


def side_by_side(case: Case, folder: Path) -> Found:
    """On one rank of a launch, or alone. `folder` is shared by the ranks, and new."""
    from dtl.config import load_config
    from dtl.training.dataloaders import DataLoaders
    from dtl.training.run import run

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    images = folder / "tiny/images"
    if rank == 0:
        tiny_images(folder / "tiny", case.batch * world)
    while not (folder / "tiny/complete").exists():
        time.sleep(0.05)
    recipe = folder / f"recipe-{rank}.yaml"
    text = RECIPE.format(
        folder=folder, images=images, device=case.device, size=case.image_size, batch=case.batch * world, micro=case.batch, network=case.network,
        channels_last=str(case.channels_last).lower(), compiled=str(case.compiled).lower(), precision=case.precision, compression=case.gradient_compression,
    )  # fmt: skip
    recipe.write_text(text)
    found, real = Found(), DataLoaders.train_steps

    def stream(self: DataLoaders, phase: Any, phase_step: int) -> Iterator[list[Any]]:
        first = real(self, phase, phase_step)
        (batch,) = next(first)
        first.close()  # type: ignore[attr-defined]
        yield from _in_turns(case, batch, found, world)

    DataLoaders.train_steps = stream  # type: ignore[method-assign]
    try:
        run(*load_config(["--config", str(recipe), "--run.name", f"{case.precision}-{case.gradient_compression}-{case.compiled}"]))
    except Enough:
        pass
    finally:
        DataLoaders.train_steps = real  # type: ignore[method-assign]
    return found


def _in_turns(case: Case, batch: Any, found: Found, world: int) -> Iterator[list[Any]]:
    on_gpu = case.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        if world > 1:
            dist.barrier()
        return time.perf_counter()

    def measured(name: str, started: float, number: int) -> None:
        seconds = (wait() - started) / case.steps
        if number:
            found.seconds.setdefault(name, []).append(seconds)
        if on_gpu:
            added = (torch.cuda.max_memory_allocated() - before) / 2**30
            found.memory[name] = max(added, found.memory.get(name, 0.0))

    others = {name: LOOPS[name](case, device, world) for name in case.others}
    for number in range(case.rounds + 1):
        for name in (DTL, *others):
            started = wait()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            for _ in range(case.steps):
                if name == DTL:
                    yield [batch]
                else:
                    others[name](batch.images, batch.labels)
            measured(name, started, number)
    raise Enough


# ---- the other loops


def _network(case: Case, device: torch.device, world: int, *, static_graph: bool = False) -> tuple[Any, Any]:
    from dtl.models.build import build

    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    module: Any = build(case.network, num_classes=CLASSES, own=True).module.to(device).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=True)
    if world > 1:
        ids = [device] if device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, static_graph=static_graph)
    return torch.compile(module) if case.compiled else module, optimizer


def _autocast(case: Case, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if case.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=case.precision != "no")


def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """255 times ImageNet's mean and standard deviation."""
    mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return 255 * torch.tensor(mean, device=device).view(1, 3, 1, 1), 255 * torch.tensor(deviation, device=device).view(1, 3, 1, 1)


def bare_loop(case: Case, device: torch.device, world: int, *, static_graph: bool = False) -> Step:
    """The plainest loop that is fast: bytes are copied without waiting and normalised on the device; nothing is printed."""
    module, optimizer = _network(case, device, world, static_graph=static_graph)
    mean, deviation = _constants(device)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format

    def step(images: Tensor, labels: Tensor) -> None:
        inputs = images.to(device, non_blocking=True).to(torch.float32).sub_(mean).div_(deviation).contiguous(memory_format=memory_format)
        with _autocast(case, device):
            logits = module(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels.to(device, non_blocking=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def timm_loop(case: Case, device: torch.device, world: int) -> Step:
    """As timm's train.py and its PrefetchLoader do: the copy and the normalisation on a stream of their own; the loss is read at each 50th step."""
    module, optimizer = _network(case, device, world)
    mean, deviation = _constants(device)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    count = 0

    def step(images: Tensor, labels: Tensor) -> None:
        nonlocal count
        with torch.cuda.stream(stream):
            images = images.to(device, non_blocking=True).to(torch.float32).sub_(mean).div_(deviation)
            labels = labels.to(device, non_blocking=True)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
            images.record_stream(torch.cuda.current_stream())
            labels.record_stream(torch.cuda.current_stream())
        images = images.contiguous(memory_format=memory_format)
        with _autocast(case, device):
            loss = nn.functional.cross_entropy(module(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        count += 1
        if count % 50 == 0:
            loss.item()

    return step


def torchvision_loop(case: Case, device: torch.device, world: int) -> Step:
    """As torchvision's references/classification/train.py does: images normalised on the host, label smoothing, loss and accuracies read at each step."""
    module, optimizer = _network(case, device, world)
    mean, deviation = _constants(torch.device("cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    ready: list[Tensor] = []  # its loader processes normalise: not a part of the step

    def step(images: Tensor, labels: Tensor) -> None:
        if not ready:
            normalised = (images.to(torch.float32) - mean) / deviation
            ready.append(normalised.pin_memory() if device.type == "cuda" else normalised)
        inputs, labels = ready[0].to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with _autocast(case, device):
            output = module(inputs)
            loss = criterion(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.inference_mode():
            right = output.topk(5, 1).indices.eq(labels[:, None])
            first, fifth = right[:, :1].sum(dtype=torch.float32), right.sum(dtype=torch.float32)
        for value in (loss, first, fifth):
            value.item()

    return step


LOOPS: dict[str, Callable[[Case, torch.device, int], Step]] = {
    BARE: bare_loop,
    STATIC: lambda case, device, world: bare_loop(case, device, world, static_graph=True),
    TIMM: timm_loop,
    TORCHVISION: torchvision_loop,
}
