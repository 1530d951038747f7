"""What `dtl pack` and its reader take of memory as the number of images grows: bytes a sample beyond what few images take.

    python -m benchmarks.pack_scale [--small 20000] [--large 1000000] [--classes 1000] [--folder FOLDER] [--out FILE]

Two folders of tiny PNG files (8 x 8 pixels, made in FOLDER, about 4 KiB of disk each) are packed by two processes; ten times a second the
memory of the main process and of all its children is looked at, and the most is kept. Then the shards are opened and 20,000 random samples
read. What the numbers of the large folder exceed those of the small one by, divided by the files more, is what a sample takes. Counted is
memory of the processes' own (RssAnon): mapped files belong to the page cache. Limit: 200 bytes.
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
import json, sys, threading, time
import psutil
from dtl.data.packing.pack import pack

def own(pid):
    try:
        return next(int(line.split()[1]) for line in open(f"/proc/{pid}/status") if line.startswith("RssAnon")) * 1024
    except (OSError, StopIteration):
        return 0  # it has ended

me, peak, over = psutil.Process(), {"main": 0, "all": 0}, threading.Event()
def watch():
    while not over.wait(0.1):
        main = own(me.pid)
        peak["main"] = max(peak["main"], main)
        peak["all"] = max(peak["all"], main + sum(own(child.pid) for child in me.children(recursive=True)))

watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
pack(sys.argv[1], sys.argv[2], processes=2, progress=False)
over.set()
watcher.join()
print(json.dumps({"seconds": time.perf_counter() - started, **peak}))
"""
READER = """
import json, resource, sys
import numpy as np
from dtl.data.shards.index import Shards

shards = Shards.open(sys.argv[1])
draw = np.random.default_rng(0)
for _ in range(80):
    shards.read(np.sort(draw.integers(0, shards.num_samples, 250)))
private = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
print(json.dumps({"reader": private, "samples": shards.num_samples}))
"""


def make(folder: Path, num: int, classes: int) -> None:
    """`num` files of different bytes, in `classes` folders."""
    import numpy as np

    from dtl.data.decoding.png import store_png

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
    for what, key in (("packing, main process", "main"), ("packing, all three processes together", "all"), ("reading", "reader")):
        rows.append([what, f"{small[key] / 2**20:.0f}", f"{large[key] / 2**20:.0f}", f"{(large[key] - small[key]) / more:.0f}", LIMIT])
    lines = table(("peak memory", f"{chosen.small:,} files, MiB", f"{chosen.large:,} files, MiB", "bytes a sample more", "limit"), rows)
    lines.append(f"\nPacked in {small['seconds']:.0f} and {large['seconds']:.0f} s.")
    report("Packing many files", lines, {"small": small, "large": large}, facts, chosen.out)


if __name__ == "__main__":
    main()
