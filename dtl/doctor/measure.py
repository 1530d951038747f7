"""Measurements that the doctor runs in another process, so that a hang or a crash is a finding and does not end the doctor.

`python -m dtl.doctor.measure KIND JSON` prints one JSON object as its last line.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from dtl.config.models import ImageSize, as_size, sides

REDUCE_MIB = 8


def _size(given: dict[str, Any]) -> ImageSize:
    size = given["image_size"]
    return as_size(*map(int, size if isinstance(size, list) else (size, size)))


def torch_facts(given: dict[str, Any]) -> dict[str, Any]:
    """The GPUs as PyTorch sees them; using them may hang."""
    import torch

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "count": 0,
    }
    try:
        facts["count"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if facts["count"]:
            facts["names"] = [torch.cuda.get_device_name(i) for i in range(facts["count"])]
            facts["capabilities"] = ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(facts["count"])]
            facts["arch_list"] = torch.cuda.get_arch_list()
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
            torch.zeros(1, device="cuda")
        elif torch.version.cuda:
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        facts["error"] = (str(error).splitlines() or [type(error).__name__])[0]
    return facts


def reduce(given: dict[str, Any]) -> dict[str, Any]:
    """One of two ranks in an all-reduce: rank 0 contributes 1, rank 1 contributes 2."""
    import torch
    import torch.distributed as dist

    rank, backend = int(given["rank"]), str(given["backend"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(given["store"]), 2
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=float(given["seconds"])))
    values = torch.full((REDUCE_MIB * 2**18,), rank + 1.0, device=device)
    dist.all_reduce(values.clone())
    _wait(device)
    start = time.perf_counter()
    dist.all_reduce(values)
    _wait(device)
    seconds = time.perf_counter() - start
    low, high = float(values.min()), float(values.max())
    dist.destroy_process_group()
    return {"sum": low if low == high else [low, high], "mib_s": REDUCE_MIB / seconds}


def decode(given: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per image on one core, from its bytes to its place in the batch, as in a loader process."""
    import numpy as np
    import torch

    from dtl.config.models import AugmentConfig
    from dtl.data.decoding.decode import probe
    from dtl.data.loading.loader import Stored, decode_into
    from dtl.data.transforms.transforms import train_transform
    from dtl.reading import Reading

    torch.set_num_threads(1)
    size = _size(given)
    images, what = _some_images(given.get("data"))
    transform = train_transform(image_size=size, augment=AugmentConfig(), reading=Reading((0.0, 65_535.0), alpha=True))
    out = torch.empty((1, 3, *sides(size)), dtype=torch.uint8, memory_format=torch.channels_last)[0]
    headers = [probe(data) for data in images]
    end = time.process_time() + float(given["seconds"])
    count, start = 0, 0.0
    while time.process_time() < end or count == 0:
        for number, data in enumerate(images):
            width, height = headers[number].turned_size
            draws = transform.draw(np.array([number]), np.array([width]), np.array([height]), seed=0, epoch=count)
            decode_into(out, Stored(data, height, width, headers[number].orientation), transform, draws, 0)
        # The first round warms up.
        start, count = (start, count + 1) if count else (time.process_time(), 1)
        end = max(end, start + 0.01)
    rounds = max(count - 1, 1)
    return {"ms_per_image": 1000 * (time.process_time() - start) / (rounds * len(images)), "what": what}


def model(given: dict[str, Any]) -> dict[str, Any]:
    """Images/s of training this network on this device as `dtl train` would, without data loading; that precision, and its number of parameters."""
    import torch

    from dtl.distributed.launch import read_launch
    from dtl.distributed.runtime import Runtime, resolve_precision
    from dtl.models.build import build, forward_logits
    from dtl.models.network import to_device

    name, size, batch = str(given["model"]), _size(given), int(given["batch_size"])
    device = Runtime.alone(str(given["device"])).device
    wanted, on_cpu = given.get("precision", "auto"), device.type == "cpu"
    # A recipe for GPUs that is looked at on a machine without one: what this machine would do.
    precision = resolve_precision("auto" if on_cpu and wanted == "fp16" else wanted, read_launch({}, []), on_cpu)
    module = build(name, num_classes=10, options=dict(given.get("options", {})), own=True).module
    channels_last = to_device(module, device, channels_last=given.get("channels_last", "auto"))
    images = torch.randn(batch, 3, *sides(size), device=device).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    optimizer, scaler = torch.optim.SGD(module.parameters(), lr=1e-6), torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    deadline, steps, start = time.perf_counter() + float(given["seconds"]), 0, 0.0
    while steps < 2 or (time.perf_counter() < deadline and steps < 50):
        with torch.autocast(device.type, dtype=half, enabled=precision != "no"):
            logits, _ = forward_logits(module, images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        steps += 1
        if steps == 1:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    found = {"images_s": (steps - 1) * batch / seconds, "precision": precision, "parameters": sum(p.numel() for p in module.parameters())}
    if device.type == "cuda":
        found |= {"used": torch.cuda.max_memory_reserved(device), "total": torch.cuda.get_device_properties(device).total_memory}
    return found


def _some_images(data: str | None, limit: int = 32) -> tuple[list[bytes], str]:
    """Up to `limit` images of a folder of images or of packed shards; without `data`, one synthetic image."""
    import numpy as np

    if data:
        from dtl.data.shards.index import MANIFEST_NAME, Shards
        from dtl.data.sources.base import IMAGE_EXTENSIONS
        from dtl.files import MAX_FILE_BYTES, read_regular

        folder = Path(data)
        if (folder / MANIFEST_NAME).is_file():
            shards = Shards.open(folder)
            chosen = np.unique(np.linspace(0, shards.num_samples - 1, limit).astype(np.int64))
            found = [one for one in shards.read(chosen) if isinstance(one, bytes)]
            if found:
                return found, f"{len(found)} images of {data}"
        files: list[Path] = []
        for base, _, names in os.walk(folder):
            files += [Path(base) / name for name in sorted(names) if Path(name).suffix.lower() in IMAGE_EXTENSIONS][:4]
            if len(files) >= limit:
                break
        if files:
            return [read_regular(file, max_bytes=MAX_FILE_BYTES) for file in files[:limit]], f"{len(files[:limit])} images of {data}"
        raise ValueError(f"{data} has no images that could be read")
    from PIL import Image

    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    rough.save(file, "JPEG", quality=90)
    return [file.getvalue()], "a synthetic JPEG of 500 x 375"


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"torch": torch_facts, "reduce": reduce, "decode": decode, "model": model}

if __name__ == "__main__":
    print("\n" + json.dumps(KINDS[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
