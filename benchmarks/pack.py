"""`dtl pack` at 2 processes against plain copying of the same files, checksums on.

    DTL_DATA=... python -m benchmarks.pack [--copies 12] [--rounds 3] [--out FILE]

The files are copies of hymenoptera's training images in a temporary folder. Copying is `shutil.copyfile` of each file into another folder, by
two processes: as it is, and ending with `sync` (packing ends with fsync of its shards). The files are in the page cache for all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import Spread, cpu_seconds, data_folder, interleaved, machine, parser, report, seconds, table


@dataclass(frozen=True)
class Timing:
    images_per_second: float
    cpu_ms: float


def copy(files: list[tuple[Path, Path]]) -> None:
    for source, target in files:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def copy_all(images: Path, target: Path, *, sync: bool) -> None:
    files = [(path, target / path.relative_to(images)) for path in sorted(images.rglob("*.jpg"))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(copy, [files[::2], files[1::2]])
    if sync:
        os.sync()


def pack_all(images: Path, target: Path) -> None:
    from dtl.data.packing.pack import pack

    pack(images, target, processes=2, progress=False)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--copies", type=int, default=12)
    chosen = options.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "images"
        for path in sorted((data_folder() / "hymenoptera_data" / "train").glob("*/*.jp*g")):
            (images / path.parent.name).mkdir(parents=True, exist_ok=True)
            for number in range(chosen.copies):
                shutil.copyfile(path, images / path.parent.name / f"{path.stem}_{number}.jpg")
        count, target = len(list(images.rglob("*.jpg"))), Path(name) / "target"

        def timed(work: str) -> Timing:
            before = cpu_seconds()
            ways = {"copy": partial(copy_all, sync=False), "copy_sync": partial(copy_all, sync=True), "dtl": pack_all}
            took = seconds(lambda: ways[work](images, target))  # type: ignore[operator]
            used = cpu_seconds() - before
            shutil.rmtree(target)
            return Timing(round(count / took, 1), round(1000 * used / count, 3))

        found = interleaved({work: partial(timed, work) for work in ("copy", "copy_sync", "dtl")}, chosen.rounds)
    names = {"copy": "plain copy", "copy_sync": "plain copy, then sync", "dtl": "dtl pack, checksums on"}
    rows = []
    for work, timings in found.items():
        ratio = Spread.of([t.images_per_second / c.images_per_second for c, t in zip(found["copy"], timings)])
        rows.append([names[work], Spread.of([t.images_per_second for t in timings]).show(0), ratio.show(), Spread.of([t.cpu_ms for t in timings]).show()])
    lines = [f"{count} images", "", *table(("way", "images/s", "x", "CPU ms/image"), rows)]
    report("Packing", lines, {work: [asdict(t) for t in timings] for work, timings in found.items()}, facts, chosen.out)


if __name__ == "__main__":
    main()
