"""What the sections ask for in processes of their own, on one rank or on several. Each function returns what JSON can hold."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def printed(function: str, arguments: str) -> None:
    """What the function returns, as the last line that this process prints."""
    module, _, name = function.partition(":")
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))), flush=True)


def count() -> int:
    return torch.cuda.device_count()


def half() -> str:
    """The mixed precision that these GPUs are made for."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def machine_facts() -> dict[str, Any]:
    from benchmarks.measure import machine

    return machine() | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "capability": [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())],
        "memory_gib_of_a_gpu": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
    }


def _meet() -> torch.device:
    rank = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(rank)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    return torch.device("cuda", rank)


def _seconds(call: Any, times: int) -> float:
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def all_reduce(mebibytes: list[float], times: int) -> dict[str, float]:
    """GB/s of the bus (NCCL's busbw), by MiB."""
    device, found = _meet(), {}
    world = dist.get_world_size()
    for size in mebibytes:
        values = torch.ones(int(size * 2**18), device=device)
        seconds = _seconds(lambda values=values: dist.all_reduce(values), times)
        found[str(size)] = values.numel() * 4 / seconds * 2 * (world - 1) / world / 1e9
    dist.destroy_process_group()
    return found


def host_to_device(mebibytes: int, times: int) -> dict[str, float]:
    """GB/s from pinned and from pageable memory."""
    pageable = torch.ones(mebibytes * 2**20, dtype=torch.uint8)
    there = torch.empty_like(pageable, device="cuda")
    sources = {"pinned": pageable.pin_memory(), "pageable": pageable}
    return {name: mebibytes * 2**20 / _seconds(lambda host=host: there.copy_(host, non_blocking=True), times) / 1e9 for name, host in sources.items()}


def loader(shards: str, image_size: int, batch: int, workers: int, batches: int, on_device: bool) -> dict[str, float]:
    """Images/s of dtl's loader, the first quarter warms up; and the host's time for an image's crop and resize, where they run on the device."""
    import dtl
    from dtl.data.loading import device

    place, spent, placed = device.place_on_device, 0.0, 0

    def timed(*given: Any) -> None:
        nonlocal spent, placed
        asked = time.perf_counter()
        place(*given)
        spent, placed = spent + time.perf_counter() - asked, placed + 1

    device.place_on_device = timed  # type: ignore[assignment]
    made = dtl.build_loader(shards, image_size=image_size, batch_size=batch, workers=workers, decode_on=torch.device("cuda") if on_device else None)
    warm, images, started = max(1, batches // 4), 0, time.perf_counter()
    for number, (pictures, *_) in enumerate(made):
        if number >= batches:
            break
        images += len(pictures)
        if number + 1 == warm:
            torch.cuda.synchronize()
            images, started = 0, time.perf_counter()
    torch.cuda.synchronize()
    return {"images_s": images / (time.perf_counter() - started), "host_seconds_an_image": spent / max(1, placed)}


def beside_its_gpu() -> None:
    """This rank, and the loader processes that it starts, on the cores of its GPU's NUMA node, where the system says which."""
    properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    place = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    try:
        text = Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/local_cpulist".format(*place)).read_text().strip()
    except OSError:
        text = ""
    spans = [part.partition("-") for part in text.split(",") if part]
    cores = {core for first, _, last in spans for core in range(int(first), int(last or first) + 1)} & os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    print(f"cores beside its GPU: {text if cores else 'unknown'}", file=sys.stderr)


def evaluating(name: str, batch: int, size: int, batches: int) -> dict[str, float]:
    """Images/s of a network that evaluates, as it is written (which dtl does) and compiled, and the seconds that compiling takes."""
    from dtl.models.build import build, forward_logits

    module = build(name, num_classes=1000, own=True).module.cuda().to(memory_format=torch.channels_last).eval()
    images = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    compiled, found = torch.compile(module), {}
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for how, network in (("as_written", module), ("compiled", compiled)):
            started = time.perf_counter()
            forward_logits(network, images)
            torch.cuda.synchronize()
            found[f"{how}_first_seconds"] = time.perf_counter() - started
            found[f"{how}_images_s"] = batch / _seconds(lambda network=network: forward_logits(network, images), batches)
    return found


def family(name: str, image_size: int, device: str, steps: int) -> dict[str, list[float]]:
    """Losses of some steps in float32 without TF32, and the logits before them."""
    from dtl.models.build import build, forward_logits

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module = build(name, num_classes=5, own=True).module
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    module.to(device)
    images, labels = torch.randn(8, 3, image_size, image_size).to(device), (torch.arange(8) % 5).to(device)
    module.eval()
    with torch.no_grad():
        logits, _ = forward_logits(module, images)
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=1e-3), []
    for _ in range(steps):  # in eval mode: no dropout, no stochastic depth, and norms that do not magnify rounding
        loss = torch.nn.functional.cross_entropy(forward_logits(module, images)[0], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"logits": logits.flatten().tolist(), "losses": losses}


def loops(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """benchmarks/side_by_side.py; memory that ends is a result too."""
    from benchmarks.side_by_side import Case, side_by_side

    try:
        found = side_by_side(Case(**{**case, "others": tuple(case["others"])}), Path(folder))
    except RuntimeError as error:  # torch's, or dtl's about it
        if "out of memory" not in str(error).lower():
            raise
        return {"out_of_memory": str(error).splitlines()[0]}
    return {"seconds": found.seconds, "memory": found.memory}


def image_folder_loop(images: str, case: dict[str, Any], workers: int, batches: int) -> float:
    """Images/s of the bare loop on torchvision's ImageFolder, transforms and DataLoader, as its references use them."""
    from torchvision import datasets, transforms

    from benchmarks.side_by_side import Case, bare_loop

    size = case["image_size"]
    made = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    data = datasets.ImageFolder(images, made)
    source = torch.utils.data.DataLoader(
        data, case["batch"], shuffle=True, num_workers=workers, pin_memory=True, drop_last=True, persistent_workers=workers > 0
    )
    step = bare_loop(Case(**{**case, "others": tuple(case["others"])}), torch.device("cuda"), 1)
    num, started, warm = 0, 0.0, max(1, batches // 4)
    while num < batches:
        for pictures, labels in source:
            step(pictures, labels)
            num += 1
            if num == warm:
                torch.cuda.synchronize()
                started = time.perf_counter()
            if num == batches:
                break
    torch.cuda.synchronize()
    return (num - warm) * case["batch"] / (time.perf_counter() - started) if num > warm else 0.0
