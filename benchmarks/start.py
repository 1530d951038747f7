"""How long until something happens: `dtl --help`, `dtl train --help`, the first step of a run, also a resumed one, the first batch of a loader.

    python -m benchmarks.start [--rounds 5] [--out FILE]

Each measurement is a fresh process; `bare` is the interpreter alone, `import torch` what nothing that computes can avoid. The first step is
that of the built-in example with its data packed already, and packed anew; the first batch is what `dtl.build_loader` takes beyond its imports.
Resumed are two runs of it that were killed after a checkpoint, of a batch of 8 in an epoch of 180 steps: at 10 % of the second epoch, and at 90 %.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Spread, interleaved, machine, parser, report, table

STEPS_OF_EPOCH, AT_10, AT_90 = 180, 198, 342
"""of the resumed run, and where it was killed"""
LIMITS = {"dtl --help": 0.4, "dtl train --help": 0.6, "first step, packed": 12.0, "first step, not packed": 12.0, "first batch": 2.0}
LOADER = """
import time
import dtl, torch
dtl.build_loader
start = time.perf_counter()
for batch in dtl.build_loader({packed!r}, image_size=64, batch_size=64, workers=2):
    print(time.perf_counter() - start, flush=True)
    break
"""


def process(*command: str) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    return run


def first_step(folder: Path, *, packed: bool) -> float:
    """Seconds from the launch to the first line of history."""
    number = len(list(folder.glob("runs*")))
    runs, cache = folder / f"runs{number}", folder / ("cache" if packed else f"cache{number}")
    start = time.time()
    options = {"--run.dir": str(runs), "--data.cache-dir": str(cache), "--tracking.log-every": "1", "--tracking.wandb": "off"}
    command = [sys.executable, "-m", "dtl", "train", *(part for pair in options.items() for part in pair)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.time() < start + 300 and run.poll() is None:
            for path in runs.glob("*/history.jsonl"):
                if any(json.loads(line).get("event") == "train" for line in path.read_text().splitlines() if line.endswith("}")):
                    return time.time() - start
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
    raise RuntimeError(f"no step in {time.time() - start:.0f} s")


def killed_run(folder: Path, step: int) -> Path:
    """The folder of runs of one that was killed as soon as its first checkpoint, of `step`, was whole; its history ends there."""
    runs = folder / f"killed-at-{step}"
    run = subprocess.Popen(resumable(folder, runs, every_steps=step), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(runs.glob(f"*/checkpoints/step-*{step}")):
            if run.poll() is not None:
                raise RuntimeError(f"the run ended before step {step}")
            time.sleep(0.01)
    finally:
        run.kill()
        run.wait()
    (history,) = runs.glob("*/history.jsonl")
    lines = [line for line in history.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    history.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step))
    return runs


def resumable(folder: Path, runs: Path, *, every_steps: int) -> list[str]:
    options = {
        "--run.dir": str(runs), "--data.cache-dir": str(folder / "cache"), "--data.global-batch-size": "8", "--data.workers": "1", "--tracking.wandb": "off",
        "--tracking.log-every": "1", "--checkpoint.every-steps": str(every_steps), "--phases.pretext.task": "classify", "--phases.pretext.epochs": "4",
    }  # fmt: skip
    return [sys.executable, "-m", "dtl", "train", *(part for pair in options.items() for part in pair)]


def resumed_step(folder: Path, killed: Path, step: int) -> float:
    """Seconds from the launch to the first step after the checkpoint."""
    runs = folder / "resumed"
    shutil.copytree(killed, runs)
    start = time.time()
    run = subprocess.Popen(resumable(folder, runs, every_steps=step), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while time.time() < start + 300 and run.poll() is None:
            (history,) = runs.glob("*/history.jsonl")
            events = [json.loads(line) for line in history.read_text().splitlines() if line.endswith("}")]
            if any(event.get("event") == "train" and event["step"] > step for event in events):
                return time.time() - start
            time.sleep(0.02)
    finally:
        run.kill()
        errors = run.communicate()[1]
        shutil.rmtree(runs)
    raise RuntimeError(f"no step in {time.time() - start:.0f} s: {errors[-500:]}")


def main() -> None:
    chosen = parser(__doc__).parse_args()
    facts = machine()
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "dtl", "pack", "digits", str(folder / "digits")], check=True, stdout=subprocess.DEVNULL)
        packed = next(path.parent for path in folder.rglob("manifest.json"))
        first_step(folder, packed=True)  # fills the cache
        at_10, at_90 = killed_run(folder, AT_10), killed_run(folder, AT_90)

        def first_batch() -> float:
            return float(subprocess.run([sys.executable, "-c", LOADER.format(packed=str(packed))], check=True, capture_output=True, text=True).stdout)

        found = interleaved(
            {
                "bare": process("-c", "pass"),
                "import torch": process("-c", "import torch"),
                "dtl --help": process("-m", "dtl", "--help"),
                "dtl train --help": process("-m", "dtl", "train", "--help"),
                "first step, packed": lambda: first_step(folder, packed=True),
                "first step, not packed": lambda: first_step(folder, packed=False),
                "first batch": first_batch,
                "first step, resumed at 10 % of an epoch": lambda: resumed_step(folder, at_10, AT_10),
                "first step, resumed at 90 % of an epoch": lambda: resumed_step(folder, at_90, AT_90),
            },
            chosen.rounds,
        )
    rows = [[name, Spread.of(values).show(), LIMITS.get(name, "")] for name, values in found.items()]
    report("Start", table(("what", "seconds", "limit"), rows), found, facts, chosen.out)


if __name__ == "__main__":
    main()
