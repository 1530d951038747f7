"""The first day on GPUs: is dtl right on them, does it survive faults, is it fast? One command for a machine with 1, 2, 4 or 8 GPUs.

    python -m benchmarks.first_day --out DIR [--only be] [--photos 20000] [--steps 20] [--rounds 8]

An estimated 30 to 45 minutes. It needs no download: 20,000 photos of about 500 x 375 pixels are made up, and packed once. DIR/report.md and DIR/report.json are
written anew after each section, so what was found stays there if a later one fails. The exit status is 0 if every section ended and every pass mark holds,
1 otherwise. `--device sim` runs it on two simulated GPUs (tests/gpusim): it shows that everything runs; the times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    made = argparse.ArgumentParser(prog="first_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="a folder for the report, the photos and the runs")
    made.add_argument("--device", choices=("cuda", "sim"), default="cuda", help="this machine's GPUs, or simulated ones")
    made.add_argument("--only", help="sections, by letter: abe")
    made.add_argument("--photos", type=int, help="how many photos are made up (20,000; simulated: 80)")
    made.add_argument("--steps", type=int, help="of a block or a short run (20; simulated: 2)")
    made.add_argument("--rounds", type=int, help="interleaved blocks of each loop (8; simulated: 1)")
    options = made.parse_args()

    from benchmarks.first_day import correct, speed
    from benchmarks.first_day.day import Day, Section

    small = options.device == "sim"
    if small:
        from gpusim import simulation

        if problem := simulation.missing():
            raise SystemExit(problem)
    else:
        os.environ.pop("ACCELERATE_USE_CPU", None)
    day = Day(
        options.out.resolve(), options.device, steps=options.steps or (2 if small else 20), rounds=options.rounds or (1 if small else 8),
        num_photos=options.photos or (80 if small else 20_000),
    )  # fmt: skip
    if not small and day.num_gpus == 0:
        raise SystemExit("this machine shows no GPU to PyTorch; --device sim shows that the benchmark runs")
    sections = {
        "a": ("the machine", speed.facts),
        "b": ("what GPUs compute", correct.correctness),
        "c": ("the same bits twice", correct.bit_identity),
        "d": ("a rank that fails", correct.faults),
        "e": ("one GPU", speed.one_gpu),
        "f": ("what overlaps, and where the host waits", speed.overlap),
        "g": ("scaling", speed.scales),
        "h": ("decoding on the device", speed.device_decoding),
        "i": ("a whole fine-tune", speed.whole),
    }
    unknown = set(options.only or "") - set(sections)
    if unknown:
        raise SystemExit(f"--only: there is no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    for name, (title, do) in sections.items():
        if not options.only or name in options.only:
            day.work_on(Section(name, title), do)
    print(f"\n{'all pass marks hold' if day.passed else 'not all pass marks hold'}: {day.out / 'report.md'}")
    return 0 if day.passed else 1


if __name__ == "__main__":
    sys.exit(main())
