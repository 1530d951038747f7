"""What loading a large file of weights costs, in seconds of CPU, beside reading it: all of it is checked.

    python -m benchmarks.transfer_load [--gigabytes 2] [--out FILE.json]

`read` is the file read into memory, as a program has to before it can use it. `dtl` reads it, hashes it, plans, checks that each value is finite and copies
it into the network; `torch` is `load_state_dict` of the same file, which checks nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dtl.checkpoint import load_pretrained

WIDTH = 4096


def network(gigabytes: float) -> nn.Module:
    """Linear layers of 64 MiB each, and a head."""
    layers = max(1, round(gigabytes * 2**30 / (4 * WIDTH * WIDTH)))
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(layers)), nn.Linear(WIDTH, 10))


def cpu_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The least of several: the CPU time of the whole process, all threads."""
    times = []
    for _ in range(repeats):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return min(times)


def measure(path: Path, model: nn.Module) -> dict[str, float]:
    def plain() -> None:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
        model.load_state_dict(tensors)

    found = {"read": cpu_seconds(path.read_bytes), "torch": cpu_seconds(plain), "dtl": cpu_seconds(lambda: load_pretrained(model, path))}
    return {**{name: round(value, 3) for name, value in found.items()}, "times_reading": round(found["dtl"] / found["read"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = network(options.gigabytes)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    results: dict[str, Any] = {"gigabytes": options.gigabytes, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, save in ((".safetensors", save_file), (".pth", torch.save)):
            path = Path(folder) / f"weights{suffix}"
            save(state, path)
            results[suffix] = measure(path, model)
            path.unlink()
            print(suffix, results[suffix], flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
