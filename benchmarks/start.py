"""How long until something happens: `dtl --help`, `dtl train --help`, the first step of a run, the first batch of a loader.

    python -m benchmarks.start [--rounds 5] [--out FILE]

Each measurement is a fresh process; `bare` is the interpreter alone, `import torch` what nothing that computes can avoid. The first step is
that of the built-in example with its data packed already, and packed anew; the first batch is what `dtl.build_loader` takes beyond its imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Spread, interleaved, machine, parser, report, table

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


def main() -> None:
    chosen = parser(__doc__).parse_args()
    facts = machine()
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "dtl", "pack", "digits", str(folder / "digits")], check=True, stdout=subprocess.DEVNULL)
        packed = next(path.parent for path in folder.rglob("manifest.json"))
        first_step(folder, packed=True)  # fills the cache

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
            },
            chosen.rounds,
        )
    rows = [[name, Spread.of(values).show(), LIMITS.get(name, "")] for name, values in found.items()]
    report("Start", table(("what", "seconds", "limit"), rows), found, facts, chosen.out)


if __name__ == "__main__":
    main()
