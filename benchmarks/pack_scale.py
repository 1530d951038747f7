"""What `dtl pack` and its reader take of memory as the number of images grows: bytes a sample beyond what few images take.

    python -m benchmarks.pack_scale [--small 20000] [--large 1000000] [--classes 1000] [--folder FOLDER] [--out FILE]

Two folders of tiny PNG files (8 x 8 pixels, made in FOLDER, about 4 KiB of disk each) are packed by two processes, each in a fresh process
that reports its own peak memory and that of its largest child; then the shards are opened and 20,000 random samples read. What the numbers
of the large folder exceed those of the small one by, divided by the files more, is what a sample takes. Limit: 200 bytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine, parser, report, table

LIMIT = 200
PROGRAM = """
import json, resource, sys, time
from dtl.data.pack import pack

source, target = sys.argv[1:]
started = time.perf_counter()
pack(source, target, processes=2, progress=False)
seconds = time.perf_counter() - started
# Not ru_maxrss of this process, which begins with what its parent had.
packing = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "main": packing, "child": child}))
"""
READER = """
import json, resource, sys
import numpy as np
from dtl.data.index import Shards

shards = Shards.open(sys.argv[1])
draw = np.random.default_rng(0)
for _ in range(80):
    shards.read(np.sort(draw.integers(0, shards.num_samples, 250)))
# Private memory: the mapped index belongs to the page cache.
private = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty")) * 1024
print(json.dumps({"reader": private, "samples": shards.num_samples}))
"""


def make(folder: Path, num: int, classes: int) -> None:
    """`num` files of different bytes, in `classes` folders."""
    import numpy as np

    from dtl.data.png import store_png

    draw = np.random.default_rng(num)
    for label in range(classes):
        place = folder / f"class_{label:04d}"
        place.mkdir(parents=True)
        for number in range(label, num, classes):
            (place / f"n{label:08d}_{number:07d}.png").write_bytes(store_png(draw.integers(0, 256, (8, 8), np.uint8)))


def measure(folder: Path, num: int, classes: int) -> dict[str, float]:
    images, packed = folder / "images", folder / "packed"
    make(images, num, classes)
    found: dict[str, float] = {"files": num}
    for program, words in ((PROGRAM, (images, packed)), (READER, (packed,))):
        done = subprocess.run([sys.executable, "-c", program, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    if found["samples"] != num:
        raise RuntimeError(f"{num} files, {found['samples']} samples")
    shutil.rmtree(images)
    shutil.rmtree(packed)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--small", type=int, default=20_000)
    options.add_argument("--large", type=int, default=1_000_000)
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--folder", type=Path, help="where the files are made; the system's temporary folder otherwise")
    chosen = options.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        small, large = (measure(Path(name), num, chosen.classes) for num in (chosen.small, chosen.large))
    more = chosen.large - chosen.small
    rows = []
    for what, key in (("packing, main process", "main"), ("packing, largest child", "child"), ("reading", "reader")):
        rows.append([what, f"{small[key] / 2**20:.0f}", f"{large[key] / 2**20:.0f}", f"{(large[key] - small[key]) / more:.0f}", LIMIT])
    lines = table(("peak memory", f"{chosen.small:,} files, MiB", f"{chosen.large:,} files, MiB", "bytes a sample more", "limit"), rows)
    lines.append(f"\nPacked in {small['seconds']:.0f} and {large['seconds']:.0f} s.")
    report("Packing many files", lines, {"small": small, "large": large}, facts, chosen.out)


if __name__ == "__main__":
    main()
