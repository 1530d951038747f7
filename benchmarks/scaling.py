"""How training scales over ranks: `dtl train` against a raw DistributedDataParallel loop of the same network on the same tensors.

    python -m benchmarks.scaling [--network torchvision/resnet18] [--batch 16] [--image-size 64] [--steps 2] [--rounds 40] [--out FILE]
    torchrun --nproc-per-node 8 -m benchmarks.scaling --network torchvision/resnet50 --batch 128 --image-size 224 --steps 50

Without a launcher it starts itself on 1 and on more processes of this machine (`--processes`: 1 and 2, or 1, 2, 4, 8 as far as there are GPUs) and prints
the efficiency table; under torchrun, srun or accelerate, on any number of nodes, it measures that world and prints one row, so that runs on 1, 8, 16 ...
GPUs make the table. `--strong`: `--batch` is the global batch, which the ranks share; otherwise it is a rank's.

Within one start, blocks take turns (benchmarks/side_by_side.py): `dtl train`'s loop, and the raw one as it is and with DDP's static graph; then the same
with dtl's gradients sent as bf16. A block ends with a barrier; wall-clock time by rank 0. Norms are those of each rank in all of them.
Blocks are short and many, each is compared with the raw one beside it, and medians stand with their 95 % confidence intervals: the speed of
shared machines changes from second to second. `python -m benchmarks.first_day` runs this on a machine's GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, machine, parser, report, table, with_interval

COMPRESSED, COMPRESSED_BARE = "dtl, bf16 gradients", "bare loop, beside bf16 gradients"


def one_rank(options: Any, folder: Path) -> dict[str, list[float]]:
    """Seconds a step by loop, on this rank."""
    import torch
    import torch.distributed as dist

    from benchmarks.side_by_side import BARE, DTL, STATIC, Case, side_by_side

    world, on_gpu = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    if world > 1 and not on_gpu:
        torch.set_num_threads(1)
    precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    batch = max(1, options.batch // world) if options.strong else options.batch
    found: dict[str, list[float]] = {}
    for compression in ("no", "bf16")[: 1 if world == 1 else 2]:
        others = (BARE, STATIC) if world > 1 and compression == "no" else (BARE,)
        case = Case(
            options.network, batch, options.image_size, options.steps, options.rounds, device="cuda" if on_gpu else "cpu", precision=precision,
            gradient_compression=compression, others=others,
        )  # fmt: skip
        seconds = side_by_side(case, folder).seconds
        if compression == "bf16":
            seconds = {COMPRESSED: seconds[DTL], COMPRESSED_BARE: seconds[BARE]}
        found |= seconds
        if dist.is_initialized():
            dist.destroy_process_group()
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        _another_port()
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
        words += ["--strong"] if options.strong else []
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
        return json.loads(Path(folder, "found.json").read_text())


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
    made.add_argument("--strong", action="store_true", help="--batch is the global batch")
    made.add_argument("--processes", type=int, nargs="+", help="worlds to start on this machine")
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
        results = {world: start(options, world) for world in options.processes or worlds()}
    show(options, results, facts)


def worlds() -> list[int]:
    """1, 2, 4, 8 and so on, as many as there are GPUs; 1 and 2 without."""
    import torch

    count = torch.cuda.device_count() or 2
    return [*(world for world in (1, 2, 4, 8) if world < count), count]


def show(options: Any, results: dict[int, dict[str, list[float]]], facts: dict[str, Any]) -> None:
    kind = "the global batch" if options.strong else "a rank"
    head = f"{options.network}, {options.batch} images of {options.image_size} pixels {kind} and step"
    report("Scaling", [head, "", *rows_of(results, batch=options.batch, strong=options.strong)], results, facts, options.out)


def rows_of(results: dict[int, dict[str, list[float]]], *, batch: int, strong: bool) -> list[str]:
    """The table of seconds a step by loop, of each world."""
    from benchmarks.side_by_side import BARE, DTL

    rows, base = [], min(results)
    alone = {name: Spread.of(seconds).median for name, seconds in results[base].items()}
    for world, found in results.items():
        for name, seconds in found.items():
            spread = Spread.of([1000 * value for value in seconds])
            beside = found[COMPRESSED_BARE if name == COMPRESSED else BARE]
            ratio = "1" if beside is seconds or name == COMPRESSED_BARE else with_interval([one / other for one, other in zip(seconds, beside)], 3)
            images = batch if strong else batch * world
            reference = alone.get(name, alone[BARE if name == COMPRESSED_BARE else DTL])
            efficiency = reference / Spread.of(seconds).median * (base / world if strong else 1.0)
            rows.append([world, name, spread.show(1), ratio, f"{images * 1000 / spread.median:.0f}", f"{efficiency:.2f}"])
    return table(("ranks", "loop", "ms a step", "time against the bare loop", "images/s", f"efficiency ({base} = 1)"), rows)


if __name__ == "__main__":
    main()
