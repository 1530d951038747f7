"""What it costs the ranks to agree at each step, and to tell each other where they are: gloo on this machine.

    python -m benchmarks.agreement [--processes 2] [--steps 2000] [--rounds 9] [--out FILE]

A step here is some matrix products and an all-reduce of a million numbers, as a network's gradients are. Blocks of three ways take turns: such
steps alone, steps before which the ranks tell their flags (stop, damaged data, save) and wait for those of the others, and steps beside which
the flags travel, as in the training loop: told before the step, heard after it. What the agreement adds is the difference. Then, by
themselves: flags told and heard at once, a bare all-reduce of one integer, which is the least that any agreement costs, and the notes of the
stages that a step passes through (load, forward, backward, collective). Last, the hang doctor's thread: CPU time a second, beside a loop that
only sleeps. Wall-clock time, by rank 0; between ranks on different machines the network's latency comes on top of it.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Spread, machine, parser, report, table

SECONDS = 10.0
"""for which the doctor's thread is watched"""
ALONE, BEFORE, BESIDE = "a step without agreement", "agreed before the step", "agreed beside the step"


def one_rank(rank: int, world_size: int, port: int, steps: int, rounds: int, out: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    from dtl.distributed.runtime import Flags, Runtime
    from dtl.distributed.watchdog import Heartbeat, Watchdog

    torch.set_num_threads(1)
    with Runtime(device="cpu") as runtime:
        heart = Heartbeat()

        one, other, gradients = torch.randn(256, 512), torch.randn(512, 512), torch.randn(1_000_000)

        def alone() -> None:
            for _ in range(8):
                torch.mm(one, other)
            dist.all_reduce(gradients)
            gradients.mul_(1 / world_size)

        def before() -> None:
            runtime.exchange(Flags()).result()
            alone()

        def beside() -> None:
            told = runtime.exchange(Flags())
            alone()
            told.result()

        def flags() -> None:
            runtime.exchange(Flags()).result()

        def bare() -> None:
            dist.all_reduce(torch.zeros(1, dtype=torch.int32), op=dist.ReduceOp.MAX, group=runtime.group)

        def notes() -> None:
            heart.enter("load", 1)
            heart.enter("forward")
            heart.enter("backward")
            heart.enter("collective")

        ways: dict[str, Callable[[], None]] = {
            ALONE: alone, BEFORE: before, BESIDE: beside,
            "flags, told and heard at once": flags, "a bare all-reduce": bare, "notes of a step's stages": notes,
        }  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                times = steps // 10 if name in (ALONE, BEFORE, BESIDE) else steps
                started = time.perf_counter()
                for _ in range(times):
                    way()
                if number:
                    found[name].append(1e6 * (time.perf_counter() - started) / times)
        idle = _cpu_share()
        with Watchdog(heart, rank=rank, world_size=world_size, name="benchmark", limit=1800.0, log=print, end=print):
            watched = _cpu_share()
        if runtime.is_main:
            import json

            Path(out).write_text(json.dumps({**found, "doctor": [watched - idle]}))
        runtime.agree(None)  # all leave together


def _cpu_share() -> float:
    """CPU seconds a second of this process, while it only sleeps."""
    started = time.process_time()
    time.sleep(SECONDS)
    return (time.process_time() - started) / SECONDS


def main() -> None:
    import json

    import torch.multiprocessing as mp

    options = parser(__doc__)
    options.set_defaults(rounds=9)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--steps", type=int, default=2000, help="in a block; a tenth of it where a step computes")
    chosen = options.parse_args()
    facts = machine()
    with socket.socket() as probe, tempfile.NamedTemporaryFile() as file:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(one_rank, (chosen.processes, port, chosen.steps, chosen.rounds, file.name), nprocs=chosen.processes)  # type: ignore[attr-defined]
        found = json.loads(Path(file.name).read_text())
    (share,) = found.pop("doctor")
    rows = [[name, Spread.of(values).show(1)] for name, values in found.items()]
    for name in (BEFORE, BESIDE):
        added = [ours - alone for ours, alone in zip(found[name], found[ALONE])]
        rows.append([f"{name}, above one without", Spread.of(added).show(1)])
    rows.append(["the hang doctor's thread, µs of CPU time a second", f"{1e6 * share:.0f}"])
    lines = table((f"{chosen.processes} processes", "µs"), rows)
    report("Agreement and heartbeat", lines, {**found, "doctor_cpu_share": share}, facts, chosen.out)


if __name__ == "__main__":
    main()
