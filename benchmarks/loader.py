"""Loaders side by side: CPU time and wall-clock per image, and the time to the first batch.

    DTL_DATA=... python -m benchmarks.loader [--sets small,medium,photos] [--workers 1,2] [--systems dtl,...] [--rounds 3] [--out FILE]

Class-per-folder JPEGs made from hymenoptera's training images, in a temporary folder: `small` are the files as they are, `medium` the same
pictures at 0.19 megapixels, 4:4:4, about 112 kB (like the tutorial's originals), `photos` 4 x 4 mosaics of them, 3 megapixels, 4:2:0.
Every system crops (RandomResizedCrop 224), flips and batches the same images, in interleaved rounds; CPU time is that of all its processes
between two batches in the middle of the epoch, so prefetching is in a steady state at both ends. `x` are ratios to torchvision's
ImageFolder + DataLoader within a round. uint8 batches leave normalising to the device, as training with dtl does: the column says which.
`first batch` is the time from making the loader to its first batch, in a process that has imported everything; below the tables it is
measured once more in fresh processes that have imported torch alone, so the loaders' other imports are in it.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, cpu_seconds, data_folder, interleaved, machine, parser, report, table

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Where one set lies: as folders, packed, and packed with its short side reduced."""

    name: str
    images: Path
    packed: Path
    packed256: Path
    batch_size: int
    warmup: int
    """Batches before the clock starts."""
    measured: int
    """Batches on the clock."""


# ---- the systems: each gives an iterator over batches


def imagefolder(data: ImageSet, workers: int) -> Iterator[Any]:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return _torch_loader(ImageFolder(str(data.images), transforms.Compose(steps)), data, workers)


def torchvision_v2(data: ImageSet, workers: int) -> Iterator[Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    def read(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    steps = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    return _torch_loader(ImageFolder(str(data.images), steps, loader=read), data, workers)


def webdataset(data: ImageSet, workers: int) -> Iterator[Any]:
    import webdataset as wds
    from torchvision import transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    urls = sorted(str(path) for path in data.packed.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=wds.split_by_worker, empty_check=False)
    dataset = dataset.shuffle(500).decode("pil").to_tuple("jpg;jpeg", "cls").map_tuple(transforms.Compose(steps), int).batched(data.batch_size)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context="fork"))


def timm(data: ImageSet, workers: int) -> Iterator[Any]:
    from timm.data import create_dataset, create_loader  # type: ignore[attr-defined]

    dataset = create_dataset("", root=str(data.images))
    loader = create_loader(
        dataset, (3, SIZE, SIZE), data.batch_size, is_training=True, num_workers=workers, device=torch.device("cpu"), color_jitter=0.0, persistent_workers=False
    )
    return iter(loader)


def dtl(data: ImageSet, workers: int) -> Iterator[Any]:
    return _ours(data.packed, data, workers)


def dtl_wheels(data: ImageSet, workers: int) -> Iterator[Any]:
    return _ours(data.packed, data, workers, native="0")


def dtl_whole(data: ImageSet, workers: int) -> Iterator[Any]:
    from dtl.config.models import AugmentConfig

    return _ours(data.packed, data, workers, augment=AugmentConfig(reduced_decode=False))


def dtl_threads(data: ImageSet, workers: int) -> Iterator[Any]:
    """The same batches, made by threads of this process; as many under way as processes would have."""
    import dtl as ours
    from dtl.data.loading.loader import BatchDataset
    from dtl.data.loading.processes import PREFETCH
    from dtl.data.sampling.plan import RankLayout

    _use_native("1")
    loader = ours.build_loader(data.packed, batch_size=data.batch_size, workers=0)
    plan = loader._plan(0)
    layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=None)
    dataset = BatchDataset(loader.shards, loader.transform, image_size=SIZE, seed=0)
    asked = (request for step in range(plan.num_steps) for request in layout.micro_batches(plan, step, 0))
    with ThreadPoolExecutor(workers) as threads:
        coming = deque(threads.submit(dataset.__getitems__, request) for request in islice(asked, workers * PREFETCH))
        try:
            while coming:
                batch = coming.popleft().result()
                coming.extend(threads.submit(dataset.__getitems__, request) for request in islice(asked, 1))
                yield batch.images, batch.labels, batch.weights
        finally:
            for rest in coming:
                rest.cancel()


def dtl_256(data: ImageSet, workers: int) -> Iterator[Any]:
    return _ours(data.packed256, data, workers)


def dtl_256_wheels(data: ImageSet, workers: int) -> Iterator[Any]:
    return _ours(data.packed256, data, workers, native="0")


def _ours(shards: Path, data: ImageSet, workers: int, *, native: str = "1", **options: Any) -> Iterator[Any]:
    import dtl as ours

    _use_native(native)
    return iter(ours.build_loader(shards, batch_size=data.batch_size, workers=workers, **options))


def _use_native(switch: str) -> str:
    """What dtl then says of its native extra."""
    from dtl.data.decoding import decode as decode_crop

    os.environ[decode_crop.SWITCH] = switch
    decode_crop.native.cache_clear()
    return decode_crop.native().summary


SYSTEMS: dict[str, tuple[Callable[[ImageSet, int], Iterator[Any]], str]] = {
    "imagefolder": (imagefolder, "torchvision ImageFolder + DataLoader, float32 normalised"),
    "torchvision_v2": (torchvision_v2, "torchvision v2, its own decoder, uint8"),
    "webdataset": (webdataset, "plain webdataset, float32 normalised"),
    "timm": (timm, "timm create_loader, float32 normalised"),
    "dtl": (dtl, "dtl, untouched bytes, uint8"),
    "dtl_threads": (dtl_threads, "the same, threads in place of processes"),
    "dtl_whole": (dtl_whole, "the same, reduced_decode: false"),
    "dtl_wheels": (dtl_wheels, "dtl without the native extra"),
    "dtl_256": (dtl_256, "dtl, shards packed with --short-side 256, uint8"),
    "dtl_256_wheels": (dtl_256_wheels, "the same without the native extra"),
}


def _torch_loader(dataset: Any, data: ImageSet, workers: int) -> Iterator[Any]:
    return iter(torch.utils.data.DataLoader(dataset, data.batch_size, shuffle=True, num_workers=workers, multiprocessing_context="fork"))


# ---- the images


def make_set(name: str, folder: Path, *, images: int) -> ImageSet:
    """At least `images` files, from copies where there are fewer pictures: the decoder has no memory of them."""
    from PIL import Image

    from dtl.data.packing.pack import pack

    root = folder / name
    large = name == "photos"
    made = ImageSet(name, root / "images", root / "packed", root / "packed256", 32 if large else 64, 3 if large else 6, 6 if large else 15)
    if (made.packed256 / "manifest.json").exists():
        return made
    sources = sorted((data_folder() / "hymenoptera_data" / "train").glob("*/*.jp*g"))
    contents: list[tuple[str, bytes]] = []
    if name == "photos":
        tiles = [Image.open(path).convert("RGB").resize((512, 384), Image.Resampling.BICUBIC) for path in sources]
        for number in range(24):
            mosaic = Image.new("RGB", (4 * 512, 4 * 384))
            for place in range(16):
                mosaic.paste(tiles[(number * 7 + place) % len(tiles)], (place % 4 * 512, place // 4 * 384))
            contents.append((sources[number * 10].parent.name, _jpeg(mosaic, quality=90, subsampling=2)))
    else:
        for path in sources:
            data = path.read_bytes()
            if name == "medium":
                picture = Image.open(path).convert("RGB")
                factor = (190_000 / (picture.width * picture.height)) ** 0.5
                size = round(picture.width * factor), round(picture.height * factor)
                data = _jpeg(picture.resize(size, Image.Resampling.BICUBIC), quality=97, subsampling=0)
            contents.append((path.parent.name, data))
    shutil.rmtree(root, ignore_errors=True)
    for copy in range(-(-images // len(contents))):
        for number, (label, data) in enumerate(contents):
            path = root / "images" / label / f"{number:04d}_{copy:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    pack(root / "images", root / "packed", progress=False)
    pack(root / "images", root / "packed256", short_side=256, progress=False)
    return made


def _jpeg(picture: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# ---- the clock


@dataclass(frozen=True)
class Timing:
    cpu_ms: float
    """of all processes, per image"""
    images_per_second: float
    first_seconds: float


def measure(start: Callable[[ImageSet, int], Iterator[Any]], data: ImageSet, workers: int) -> Timing:
    began = time.perf_counter()
    batches = start(data, workers)
    images = 0
    first = cpu = clock = 0.0
    for number, (pictures, *_) in enumerate(batches):
        if number == 0:
            first = time.perf_counter() - began
        if number >= data.warmup:
            images += len(pictures)
        if number == data.warmup - 1:
            cpu, clock = cpu_seconds(), time.perf_counter()
        if number == data.warmup + data.measured - 1:
            break
    cpu, clock = max(cpu_seconds() - cpu, 1 / os.sysconf("SC_CLK_TCK")), time.perf_counter() - clock  # a few batches may take less than its tick
    assert images > 0, "the set is too small for the batches that are measured"
    if hasattr(batches, "close"):
        batches.close()
    return Timing(round(1000 * cpu / images, 3), round(images / clock, 1), round(first, 2))


FRESH = """
import time, torch
from pathlib import Path
from benchmarks.loader import SYSTEMS, ImageSet
began = time.perf_counter()
next(iter(SYSTEMS[{system!r}][0](ImageSet("", Path({images!r}), Path({packed!r}), Path(), {batch_size}, 0, 0), {workers})))
print(time.perf_counter() - began, flush=True)
import os; os._exit(0)
"""


def first_batch_of_a_fresh_process(system: str, data: ImageSet, workers: int) -> float:
    """Seconds beyond the import of torch."""
    places = {"images": str(data.images), "packed": str(data.packed), "batch_size": data.batch_size}
    code = FRESH.format(system=system, workers=workers, **places)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 2)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sets", default="small,medium,photos")
    options.add_argument("--workers", default="1,2")
    options.add_argument("--systems", default=",".join(SYSTEMS))
    options.add_argument("--keep", type=Path, help="folder where the images are made, left, and used again; a temporary one by default")
    options.add_argument("--tiny", action="store_true", help="a few batches only: does it run at all?")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    facts, lines, rows = machine(), [f"dtl: {_use_native('1')}"], []
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen.sets.split(","):
            folder = chosen.keep or Path(temporary)
            data = make_set(name, folder, images=10 if chosen.tiny else 400 if name == "photos" else 1900)
            if chosen.tiny:
                data = ImageSet(name, data.images, data.packed, data.packed256, 4, 1, 1)
            files = [path.stat().st_size for path in data.images.rglob("*.jpg")]
            lines += ["", f"## {name}: {len(files)} images of {sum(files) / len(files) / 1e3:.0f} kB"]
            for workers in map(int, chosen.workers.split(",")):
                systems = [each for each in chosen.systems.split(",") if importlib.util.find_spec(each.split("_")[0]) or each == "imagefolder"]
                ways = {each: _way(each, data, workers) for each in systems}
                found = interleaved(ways, chosen.rounds)
                lines += ["", f"{workers} worker(s), batches of {data.batch_size}", "", *_table(found)]
                rows += [{"set": name, "workers": workers, "system": s, **asdict(t)} for s, ts in found.items() for t in ts]
            fresh = interleaved({s: _fresh(s, data) for s in ("imagefolder", "dtl") if s in systems}, chosen.rounds)
            first = [f"{SYSTEMS[s][1]}: {Spread.of(seconds).show()}" for s, seconds in fresh.items()]
            lines += ["", f"First batch, 2 workers, seconds beyond the import of torch: {'; '.join(first)}"]
            rows += [{"set": name, "workers": 2, "system": s, "fresh_seconds": one} for s, seconds in fresh.items() for one in seconds]
    report("Loaders", lines, rows, facts, chosen.out)


def _way(name: str, data: ImageSet, workers: int) -> Callable[[], Timing]:
    return lambda: measure(SYSTEMS[name][0], data, workers)


def _fresh(name: str, data: ImageSet) -> Callable[[], float]:
    return lambda: first_batch_of_a_fresh_process(name, data, 2)


def _table(found: dict[str, list[Timing]]) -> list[str]:
    base = found.get("imagefolder")
    rows = []
    for name, timings in found.items():
        by_cpu = Spread.of([b.cpu_ms / t.cpu_ms for b, t in zip(base, timings)]).show() if base else "-"
        by_wall = Spread.of([t.images_per_second / b.images_per_second for b, t in zip(base, timings)]).show() if base else "-"
        rows.append(
            [
                SYSTEMS[name][1],
                Spread.of([t.cpu_ms for t in timings]).show(),
                by_cpu,
                Spread.of([t.images_per_second for t in timings]).show(0),
                by_wall,
                Spread.of([t.first_seconds for t in timings]).show(1),
            ]
        )
    return table(("system", "CPU ms/image", "x by CPU", "images/s", "x by wall", "first batch s"), rows)


if __name__ == "__main__":
    main()
