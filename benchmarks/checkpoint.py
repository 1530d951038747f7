"""How long does saving a checkpoint hold up the training loop?

    python benchmarks/checkpoint.py [--model resnet50] [--rounds 7] [--fsync] [--device cpu]

Compares, for SGD with momentum and AdamW, in turns so that a busy machine hurts all alike:
  dtl        the store of this package: snapshot in the loop, hashing, writing and syncing beside it
  dtl-sync   the same store, waiting until the checkpoint is on the disk
  torch      torch.save of the state dicts, synchronous
  accelerate accelerator.save_state
Prints the loop's stall (what training loses), and the time until the checkpoint is complete. Only dtl's variants sync to the
disk, hash what they wrote, and replace nothing before the new one is whole; `--fsync` syncs the others' files too, in their time.
It also measures the price that the writing thread takes from the steps beside it: the same matrix products with and without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dtl.checkpoint.resume.state import optimizer_tensors
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config.models import CheckpointConfig

Way = Callable[[int], tuple[float, float]]


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def train_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state, without the cost of a forward pass."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def ways(model: torch.nn.Module, optimizer: Any, accelerator: Accelerator, folder: Path, *, fsync: bool) -> tuple[dict[str, Way], list[CheckpointStore]]:
    def ours(name: str, asynchronous: bool) -> tuple[CheckpointStore, Way]:
        store = CheckpointStore(folder / name, CheckpointConfig(keep=2, asynchronous=asynchronous))

        def save(step: int) -> tuple[float, float]:
            started = time.perf_counter()
            tensors, meta = optimizer_tensors(optimizer)
            stall = store.save(step, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": meta})
            stall = max(stall, time.perf_counter() - started)
            store.flush()
            return stall, time.perf_counter() - started

        return store, save

    def timed(name: str, write: Callable[[Path], object]) -> Way:
        def save(step: int) -> tuple[float, float]:
            target = folder / name / f"step-{step}"
            started = time.perf_counter()
            target.mkdir(parents=True)
            write(target)
            if fsync:
                sync_tree(target)
            seconds = time.perf_counter() - started
            shutil.rmtree(folder / name / f"step-{step - 2}", ignore_errors=True)
            return seconds, seconds

        return save

    background, dtl_way = ours("dtl", True)
    foreground, sync_way = ours("dtl-sync", False)
    plain = timed("torch", lambda target: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, target / "all.pt"))
    state = timed("accelerate", lambda target: accelerator.save_state(str(target)))
    return {"dtl": dtl_way, "dtl-sync": sync_way, "torch": plain, "accelerate": state}, [background, foreground]


def price_beside(store: CheckpointStore, model: torch.nn.Module, optimizer: Any, rounds: int) -> tuple[float, float]:
    """Extra seconds that a fixed amount of work takes while one checkpoint is written beside it: median and largest."""
    left = torch.randn(1024, 1024)

    def work() -> float:
        started = time.perf_counter()
        for _ in range(40):
            torch.mm(left, left)
        return time.perf_counter() - started

    work()
    extra = []
    for step in range(rounds):
        alone = work()
        tensors, meta = optimizer_tensors(optimizer)
        store.save(1000 + step, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": meta})
        extra.append(work() - alone)
        store.flush()
    return statistics.median(extra), max(extra)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.3f} ({min(values):.3f}-{max(values):.3f})"


def measure(kind: str, arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(arguments.model).to(accelerator.device)
    builders = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.001)}
    named = dict(model.named_parameters())
    optimizer = builders[kind]([{"params": list(named.values()), "names": list(named)}])
    train_once(model, optimizer)
    # A fresh accelerator list each time: it saves everything that it has ever prepared.
    accelerator._models.clear()
    accelerator._optimizers.clear()
    model, optimizer = accelerator.prepare(model, optimizer)
    results: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="checkpoint-benchmark-"))
    try:
        compared, stores = ways(model, optimizer, accelerator, folder, fsync=arguments.fsync)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
        for step in range(arguments.rounds + 1):
            for name, save in compared.items():
                measured = save(step)
                if step:  # the first round allocates buffers and warms caches
                    times[name].append(measured)
        for name, pairs in times.items():
            stalls, totals = [list(values) for values in zip(*pairs, strict=True)]
            results[name] = {"stall": stalls, "total": totals}
            print(f"{kind:6s} {name:11s} stall {spread(stalls)} s    complete after {spread(totals)} s", flush=True)
        middle, most = price_beside(stores[0], model, optimizer, arguments.rounds)
        results["beside"] = {"median": middle, "max": most}
        print(f"{kind:6s} work beside the writing thread takes {middle:.3f} s longer for each checkpoint (largest {most:.3f})", flush=True)
        for store in stores:
            store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a name of torchvision.models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fsync", action="store_true", help="sync what torch and accelerate write, too")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", default=".", help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write every single time here")
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=arguments.device == "cpu")
    print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, median (least-most) of {arguments.rounds}")
    results = {kind: measure(kind, arguments, accelerator) for kind in ("sgd", "adamw")}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
