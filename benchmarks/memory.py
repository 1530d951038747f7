"""Peak memory of a fine-tune on a CPU: dtl beside a plain loop, and what its loader processes add.

    DTL_DATA=FOLDER python -m benchmarks.memory --weights FILE [--batch 32] [--image-size 224] [--rounds 3] [--out FILE]

FOLDER and FILE as for benchmarks.held_out. The commands train all of MobileNetV2 for one epoch on the same images (the set ants_bees of benchmarks.judging) in
batches of one size, with evaluations, checkpoints and the report where there are any: `dtl train --config finetune` with two loader processes and with none,
and the plain loop of benchmarks/others.py, which has none, and keeps the test images of its curve in memory. Peak: the highest sum of the proportional set
sizes of all processes of a command. CPU seconds: user and system, of all of them.

A second table is of the training process alone: CPU time to use its freed memory again (MIB of it) after two loader processes were forked, where these have
given it back (`dtl.machine.give_back_freed_memory`), and where they have not: then each page is copied.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.against import linked
from benchmarks.held_out import prepare
from benchmarks.judging import draw
from benchmarks.measure import Spread, interleaved, machine, parser, report, spent, table

MIB = 512
PROBE = """
import os, sys, time, torch
from dtl import machine
machine.keep_freed_memory()
parts = [torch.ones(4, 2**20) for _ in range({mib} // 16)]
del parts
reading, writing = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if not children[-1]:
        if {gives_back}:
            machine.give_back_freed_memory()
        os.write(writing, b".")
        time.sleep(60)
        os._exit(0)
for _ in children:
    os.read(reading, 1)
time.sleep(0.5)
began = time.process_time()
parts = [torch.ones(4, 2**20) for _ in range({mib} // 16)]
print(time.process_time() - began)
for child in children:
    os.kill(child, 9)
"""


def used_again(gives_back: bool) -> float:
    """CPU seconds of a training process to use its freed memory again, beside two forked processes."""
    code = PROBE.format(mib=MIB, gives_back=gives_back)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    made = parser(__doc__)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    add("--batch", type=int, default=32)
    add("--image-size", type=int, default=224)
    options = made.parse_args()
    facts, weights = machine(), options.weights.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).absolute()
        prepare(folder)
        seed = draw(folder, "ants_bees", 0)
        images, _ = linked(folder, "ants_bees", seed)

        def dtl(workers: int) -> dict[str, float]:
            given: dict[str, Any] = {f"data.{split}": folder / f"ants_bees-{seed}-{split}.csv" for split in ("train", "val")}
            given |= {"data.image-size": options.image_size, "data.global-batch-size": options.batch, "data.workers": workers, "run.device": "cpu"}
            given |= {"model.name": "torchvision/mobilenet_v2", "transfer.source": weights, "transfer.by": "order", "phases.all.epochs": 1, "precision": "no"}
            return measured([sys.executable, "-m", "dtl", "train", "--config", "finetune"], given)

        def loop() -> dict[str, float]:
            given = {"images": images, "weights": weights, "image-size": options.image_size, "batch": options.batch, "epochs": 1, "seed": 0}
            return measured([sys.executable, "-m", "benchmarks.others", "loop"], given)

        found = interleaved({"dtl, 2 loader processes": lambda: dtl(2), "dtl, none": lambda: dtl(0), "a plain loop": loop}, options.rounds)
    again = interleaved({"given back": lambda: used_again(True), "kept": lambda: used_again(False)}, max(5, options.rounds))
    columns = ("way", "peak memory, MiB", "CPU seconds")
    rows = [[way, *(Spread.of([one[of] for one in values]).show(0) for of in ("memory_mib", "cpu_seconds"))] for way, values in found.items()]
    ratios = [[way, Spread.of([1000 * value for value in values]).show(0)] for way, values in again.items()]
    lines = [*table(columns, rows), "", *table((f"{MIB} MiB of freed memory, by the loader processes", "CPU milliseconds to use it again"), ratios)]
    title = f"Memory of a fine-tune: MobileNetV2, batches of {options.batch} images of {options.image_size} pixels, one thread, float32"
    report(title, ["Medians (lowest to highest).", "", *lines], {"commands": found, "used_again": again}, facts, options.out)


def measured(command: list[str], given: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        used = spent([*command, *(str(word) for key, value in given.items() for word in (f"--{key}", value))], Path(temporary), threads=1)
    return {"memory_mib": round(used.memory_mib), "cpu_seconds": round(used.cpu_seconds, 1)}


if __name__ == "__main__":
    main()
