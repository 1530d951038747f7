"""For whoever has a GPU: images/s of the model alone, of the loader alone, and of both, with bf16, channels last and compile on and off.

    python -m benchmarks.gpu --data SHARDS [--models torchvision/resnet50,torchvision/vit_b_16] [--batch 128] [--workers 8] [--out FILE]

The loader is measured twice where torchcodec is installed: decoding in its processes, and on the GPU (`data.decode: device`).
`both` trains on what the loader gives: pinned, copied without waiting, normalised on the device. Medians of repeated rounds.
`--device cpu --steps 2` only shows that it runs.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Spread, interleaved, machine, parser, report, table
from dtl.distributed.runtime import use_fast_kernels


def trainer(name: str, *, device: torch.device, bf16: bool, channels_last: bool, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    from dtl.models.build import build, forward_logits

    network = build(name, num_classes=1000, own=True)
    module = network.module.to(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(memory_format=memory_format)  # type: ignore[call-overload]
    forward: Any = torch.compile(module) if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=True)
    mean, deviation = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (network.preprocessing.mean, network.preprocessing.std))
    scale = 1 / deviation

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        images = images.to(device, non_blocking=True).to(torch.float32, memory_format=memory_format).sub_(mean).mul_(scale)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, _ = forward_logits(forward, images)
        nn.functional.cross_entropy(logits.float(), labels.to(device, non_blocking=True)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def batches(options: Any, *, decode_on: torch.device | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless; pinned on the way where there is a GPU."""
    import dtl

    for epoch in itertools.count():
        loader = dtl.build_loader(
            options.data, image_size=options.image_size, batch_size=options.batch, workers=options.workers, epoch=epoch, decode_on=decode_on
        )
        for images, labels, _ in loader:
            if options.device == "cuda" and images.device.type == "cpu":
                images, labels = images.pin_memory(), labels.pin_memory()
            yield images, labels


def rate(options: Any, step: Callable[[torch.Tensor, torch.Tensor], None] | None, source: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Images/s over `--steps` steps, after as many that warm up (compilation included)."""
    images = 0
    start = 0.0
    for number in range(2 * options.steps):
        if number == options.steps:
            _wait(options.device)
            start, images = time.perf_counter(), 0
        pictures, labels = next(source)
        if step is not None:
            step(pictures, labels)
        images += len(pictures)
    _wait(options.device)
    return round(images / (time.perf_counter() - start), 1)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", default="digits", help="packed shards or an image folder; the built-in digits only show that it runs")
    made.add_argument("--models", default="torchvision/resnet50,torchvision/vit_b_16")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--image-size", type=int, default=224)
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--steps", type=int, default=50)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--variants", default="111,110,101,011,000", help="of bf16, channels last, compile; 1 is on")
    options = made.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine shows no GPU to PyTorch; --device cpu --steps 2 only shows that the benchmark runs")
    use_fast_kernels(options.device == "cuda")
    facts, rows, data = machine(), [], {}
    live = batches(options)
    ready = itertools.repeat(next(live))
    loaders = {"loader alone": live}
    if importlib.util.find_spec("torchcodec"):
        loaders["loader alone, decoding on the device"] = batches(options, decode_on=torch.device(options.device))
    data |= interleaved({name: partial(rate, options, None, loader) for name, loader in loaders.items()}, options.rounds)
    rows += [[name, "", "", "", Spread.of(data[name]).show(0), "-"] for name in loaders]
    for name, variant in itertools.product(options.models.split(","), options.variants.split(",")):
        bf16, channels_last, compiled = (letter == "1" for letter in variant)
        step = trainer(name, device=torch.device(options.device), bf16=bf16, channels_last=channels_last, compiled=compiled)
        found = interleaved({"model": partial(rate, options, step, ready), "both": partial(rate, options, step, live)}, options.rounds)
        data[f"{name} {variant}"] = found
        rows.append([name, bf16, channels_last, compiled, Spread.of(found["model"]).show(0), Spread.of(found["both"]).show(0)])
    for loader in loaders.values():
        loader.close()  # type: ignore[attr-defined]
    lines = table(("model", "bf16", "channels last", "compile", "alone, images/s", "with the loader, images/s"), rows)
    report("One GPU" if options.device == "cuda" else "No GPU: a trial of the benchmark", lines, data, facts, options.out)


if __name__ == "__main__":
    main()
