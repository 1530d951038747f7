"""How training scales over ranks: `dtl train` against a raw DistributedDataParallel loop of the same network on the same tensors.

    python -m benchmarks.scaling [--network torchvision/resnet18] [--batch 16] [--image-size 64] [--steps 2] [--rounds 40] [--out FILE]
    torchrun --nproc-per-node 8 -m benchmarks.scaling --network torchvision/resnet50 --batch 128 --image-size 224 --steps 50

Without a launcher it starts itself on 1 and on `--processes` (2) processes of this machine and prints the efficiency table; under torchrun, srun
or accelerate, on any number of nodes, it measures that world and prints one row, so that runs on 1, 8, 16 ... GPUs make the table.

Within one start, blocks take turns: the raw loop, as it is and with DDP's static graph, `dtl train`'s loop (its agreement at each step,
heartbeat, log lines and counting), and dtl's with gradients sent as bf16. A block ends with a barrier; wall-clock time by rank 0.
Blocks are short and many, each is compared with the raw one beside it, and medians stand with their 95 % confidence intervals: the speed of
shared machines changes from second to second. `--batch` is a rank's.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, machine, parser, report, table, with_interval

RECIPE = """
run: {{dir: {folder}/runs-{compression}, device: {device}, gradient_compression: "{compression}"}}
data: {{train: digits, val: digits, cache_dir: {folder}/cache, image_size: {image_size}, global_batch_size: {batch}, workers: 0, last: drop}}
model: {{name: "{network}"}}
phases: {{all: {{train: all, epochs: 1000, eval_every: 1000, lr: 0.0001, schedule: constant}}}}
tracking: {{wandb: "off", report: false}}
checkpoint: {{every_minutes: 1000}}
"""
RAW, STATIC, OURS, COMPRESSED = "raw DDP", "raw DDP, static graph", "dtl", "dtl, bf16 gradients"


def raw_loop(network: str, device: Any, precision: str, *, static_graph: bool = False) -> Callable[[Any, Any], None]:
    """One step of the plainest DistributedDataParallel loop."""
    import torch
    from torch import nn

    from dtl.models.build import build

    module: Any = build(network, num_classes=10, own=True).module.to(device, memory_format=torch.channels_last)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        module = nn.parallel.DistributedDataParallel(
            module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, static_graph=static_graph
        )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)
    mean = 255 * torch.tensor((0.485, 0.456, 0.406), device=device).view(1, 3, 1, 1)
    scale = 1 / (255 * torch.tensor((0.229, 0.224, 0.225), device=device).view(1, 3, 1, 1))

    def step(images: Any, labels: Any) -> None:
        inputs = images.to(device, non_blocking=True).sub(mean).mul_(scale).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = module(inputs)
        nn.functional.cross_entropy(logits.float(), labels.to(device, non_blocking=True)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Enough(Exception):
    """The measurement is over."""


def one_rank(options: Any, folder: Path) -> dict[str, list[float]]:
    """Seconds a step by way, on rank 0; the first block of each warms up."""
    import torch
    import torch.distributed as dist

    from dtl.config import load_config
    from dtl.training.dataloaders import DataLoaders
    from dtl.training.run import run

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.cuda.is_available():
        torch.set_num_threads(1)
    found: dict[str, list[float]] = {RAW: [], STATIC: [], OURS: [], COMPRESSED: []}
    real = DataLoaders.train_steps

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if world > 1:
            dist.barrier()
        return time.perf_counter()

    def stream(self: DataLoaders, phase: Any, phase_step: int) -> Iterator[list[Any]]:
        first = real(self, phase, phase_step)
        batches = next(first)
        first.close()  # type: ignore[attr-defined]
        (batch,) = batches
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
        raw = raw_loop(options.network, device, precision)
        static = raw_loop(options.network, device, precision, static_graph=True) if world > 1 and way == OURS else None
        for number in range(options.rounds + 1):
            started = wait()
            for _ in range(options.steps):
                yield [batch]
            ended = wait()
            for _ in range(options.steps):
                raw(batch.images, batch.labels)
            raw_ended = wait()
            if static is not None:
                for _ in range(options.steps):
                    static(batch.images, batch.labels)
            if number:
                found[way].append((ended - started) / options.steps)
                found[RAW].append((raw_ended - ended) / options.steps)
                if static is not None:
                    found[STATIC].append((wait() - raw_ended) / options.steps)
        raise Enough

    DataLoaders.train_steps = stream  # type: ignore[method-assign]
    try:
        for way, compression in ((OURS, "no"), (COMPRESSED, "bf16")):
            if way == COMPRESSED and world == 1:
                continue
            recipe = folder / f"{compression}.yaml"
            recipe.write_text(
                RECIPE.format(
                    folder=folder, compression=compression, device="cuda" if torch.cuda.is_available() else "cpu", network=options.network,
                    image_size=options.image_size, batch=options.batch * world,
                )
                + ("" if torch.cuda.is_available() else "precision: 'no'\n")
            )  # fmt: skip
            try:
                run(*load_config(["--config", str(recipe)]))
            except Enough:
                if dist.is_initialized():
                    dist.destroy_process_group()
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)
                _another_port()
    finally:
        DataLoaders.train_steps = real  # type: ignore[method-assign]
    return found


def _another_port() -> None:
    """The second start of this process makes a store of its own: the first one's may still hold the port, and torchrun's, which outlives
    both, the addresses of the first."""
    if "MASTER_PORT" in os.environ:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def start(options: Any, world: int) -> dict[str, list[float]]:
    """This program on `world` processes of this machine."""
    import torch

    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = [sys.executable, "-m", "benchmarks.scaling", "--one", folder]
        for name in ("network", "batch", "image_size", "steps", "rounds"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", **({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})}
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = []
        for rank in range(world):
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} if world > 1 else {}
            running.append(subprocess.Popen(words, env={**shared, **ranked}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit("\n".join(errors))
        return json.loads(Path(folder, "found.json").read_text())  # type: ignore[no-any-return]


def launched_rank(options: Any) -> dict[str, list[float]]:
    """A rank of somebody's launch, in one folder for all of them, which is gone afterwards: on several hosts in the one where it was started."""
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    name = f"dtl-scaling-{os.environ.get('MASTER_PORT', '0')}-{os.environ.get('SLURM_JOB_ID', os.getuid())}"
    folder = (Path(tempfile.gettempdir()) if one_host else Path.cwd()) / name
    folder.mkdir(exist_ok=True)
    try:
        return one_rank(options, folder)
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(rounds=40)
    made.add_argument("--network", default="torchvision/resnet18")
    made.add_argument("--batch", type=int, default=16, help="images a rank")
    made.add_argument("--image-size", type=int, default=64)
    made.add_argument("--steps", type=int, default=2, help="in a block")
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to start on this machine")
    made.add_argument("--one", type=Path, help="(used by itself) measure this world, and leave the result in this folder")
    options = made.parse_args()
    facts = machine()
    if options.one is not None:
        found = one_rank(options, options.one)
        if os.environ.get("RANK", "0") == "0":
            (options.one / "found.json").write_text(json.dumps(found))
        return
    launched = "WORLD_SIZE" in os.environ
    if launched:
        results = {int(os.environ["WORLD_SIZE"]): launched_rank(options)}
        if os.environ.get("RANK", "0") != "0":
            return
    else:
        results = {world: start(options, world) for world in options.processes}
    show(options, results, facts)


def show(options: Any, results: dict[int, dict[str, list[float]]], facts: dict[str, Any]) -> None:
    rows, base = [], min(results)
    alone = {way: Spread.of(seconds).median for way, seconds in results[base].items() if seconds}
    for world, found in results.items():
        raw = found[RAW]
        for way, seconds in found.items():
            if not seconds:
                continue
            spread = Spread.of([1000 * value for value in seconds])
            # Each block's neighbour in time is the raw block that came after it.
            half = raw[: len(seconds)] if way != COMPRESSED else raw[len(raw) - len(seconds) :]
            ratio = "1" if way == RAW else with_interval([one / other for one, other in zip(seconds, half)], 3)
            efficiency = alone.get(way, alone[OURS]) / Spread.of(seconds).median
            rows.append([world, way, spread.show(1), ratio, f"{options.batch * world * 1000 / spread.median:.0f}", f"{efficiency:.2f}"])
    lines = [
        f"{options.network}, {options.batch} images of {options.image_size} pixels a rank and step", "",
        *table(("ranks", "way", "ms a step", "time against raw", "images/s", f"efficiency ({base} = 1)"), rows),
    ]  # fmt: skip
    report("Scaling", lines, results, facts, options.out)


if __name__ == "__main__":
    main()
