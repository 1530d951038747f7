"""What an epoch's plan costs at any size: built, and its middle reached, in a process of its own whose peak memory is measured.

    python benchmarks/plan_scale.py [--json FILE] [--largest 1000000000]

Each row is one fresh process, as one rank is: it gets the samples per shard, builds the plan of an epoch, takes one rank's slots of the
middle step, and looks up their labels in an index of that many samples (a sparse file, mapped). `balanced` rows draw 1,000 classes alike.
Times are from the shard sizes to the first micro-batch at mid-epoch, and to the next step's. `private` is memory of the process's own at
the end; `peak` counts what it touched of mapped files too, which all processes of a node share and the kernel may take back.

The last lines simulate 1,024 ranks of 8 loader processes each: what their requests for the first, middle and last step hold together is
the global batch, each slot once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dtl.data.sampling.balance import AnyBalance, plan_epoch
from dtl.data.sampling.class_members import ClassMembers, map_members
from dtl.data.sampling.plan import EpochPlan, RankLayout

GRID = [(10**6, 10**3), (10**8, 10**3), (10**8, 10**5), (10**9, 10**4), (10**9, 10**6)]
NUM_CLASSES = 1000
GLOBAL_BATCH = 8192
RANKS, WORKERS = 1024, 8
LIMIT_SECONDS, LIMIT_MIB = 2.0, 300.0


def shard_sizes(num_samples: int, num_shards: int) -> np.ndarray:
    """Uneven: around the mean, up to a third off."""
    mean = num_samples // num_shards
    sizes = np.random.default_rng(0).integers(max(1, 2 * mean // 3), 4 * mean // 3 + 1, num_shards)
    sizes[-1] += num_samples - sizes.sum()
    if sizes[-1] < 0:
        sizes[np.argsort(sizes)[-1000:]] += sizes[-1] // 1000
        sizes[-1] = 0
        sizes[0] += num_samples - sizes.sum()
    assert sizes.sum() == num_samples and (sizes >= 0).all()  # noqa: PT018
    return sizes


def build(num_samples: int, num_shards: int, balance: AnyBalance, folder: str, *, epoch: int = 3) -> EpochPlan:
    members = None
    if balance != "none":
        counts = np.diff(np.linspace(0, num_samples, NUM_CLASSES + 1).astype(np.int64) ** 2 // num_samples)  # the largest 2,000 times the smallest
        numbers = map_members(sparse(folder, "members", 4 * num_samples), "<u4", num_samples, offset=0)
        members = ClassMembers(np.concatenate([[0], np.cumsum(counts)]), numbers)
    return plan_epoch(shard_sizes(num_samples, num_shards), balance=balance, members=members, seed=0, epoch=epoch, global_batch_size=GLOBAL_BATCH)


def sparse(folder: str, name: str, size: int) -> Path:
    path = Path(folder) / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def memory(name: str) -> float:
    """MiB, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def one_rank(num_samples: int, num_shards: int, balance: AnyBalance) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        labels = np.memmap(sparse(folder, "labels", 4 * num_samples), "<i4", "r")
        empty = memory("VmHWM")
        start = time.perf_counter()
        plan = build(num_samples, num_shards, balance, folder)
        layout = RankLayout.for_plan(plan, num_ranks=RANKS, micro_batch_size=None)
        middle = plan.num_steps // 2
        batches = list(layout.micro_batches(plan, middle, rank=RANKS // 3))
        first = time.perf_counter() - start
        assert len(labels[batches[0].samples]) == layout.micro_batch_size
        start = time.perf_counter()
        list(layout.micro_batches(plan, middle + 1, rank=RANKS // 3))
        following = time.perf_counter() - start
        return {
            "samples": num_samples,
            "shards": num_shards,
            "balance": balance,
            "to_the_middle_seconds": round(first, 3),
            "next_step_seconds": round(following, 4),
            "peak_mib": round(memory("VmHWM"), 1),
            "private_mib": round(memory("RssAnon"), 1),
            "imports_alone_mib": round(empty, 1),
        }


def partition(num_samples: int, num_shards: int) -> float:
    """Seconds to ask all ranks and workers for three steps; an AssertionError where they are no partition."""
    from dtl.data.loading.loader import StepLoader, _Requests

    plan = EpochPlan(shard_sizes(num_samples, num_shards), seed=0, epoch=3, global_batch_size=GLOBAL_BATCH * 4)
    layout = RankLayout.for_plan(plan, num_ranks=RANKS, micro_batch_size=4)
    start = time.perf_counter()
    for step in (0, plan.num_steps // 2, plan.num_steps - 1):
        taken = np.full(np.diff(plan.step_bounds(step))[0], -1, np.int64)
        for rank in range(RANKS):
            no_data: Any = None
            loader = StepLoader(no_data, no_data, dataset=object(), plans=lambda epoch: plan, layout=layout, rank=rank, image_size=8, seed=0, workers=WORKERS)
            # torch gives request i to loader process i % WORKERS.
            requests = list(_Requests(loader, plan.epoch, step, 1, None))
            for worker in range(WORKERS):
                for request in requests[worker::WORKERS]:
                    real = request.slots >= 0
                    assert (taken[request.slots[real]] == -1).all(), "a slot for two"
                    taken[request.slots[real]] = request.samples[real]
        assert taken.tolist() == plan.step_samples(step).tolist(), "not the global batch"
    return time.perf_counter() - start


def measured(num_samples: int, num_shards: int, balance: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(num_samples), str(num_shards), balance]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--largest", type=int, default=10**9, metavar="N", help="leave out larger sets (10^9)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one_rank(int(options.child[0]), int(options.child[1]), options.child[2])))
        return 0
    rows, good = [], True
    print(f"{'samples':>14} {'shards':>10} {'balance':>8} {'to the middle':>14} {'next step':>10} {'peak':>10} {'private':>10}")
    for balance in ("none", "uniform"):
        for num_samples, num_shards in GRID:
            if num_samples > options.largest:
                continue
            row = measured(num_samples, num_shards, balance)
            rows.append(row)
            good &= row["to_the_middle_seconds"] < LIMIT_SECONDS and row["peak_mib"] < LIMIT_MIB
            print(
                f"{num_samples:>14,} {num_shards:>10,} {balance:>8} {row['to_the_middle_seconds']:>12.3f} s {row['next_step_seconds']:>8.4f} s"
                f" {row['peak_mib']:>6.0f} MiB {row['private_mib']:>6.0f} MiB",
                flush=True,
            )
    print(f"the imports alone take {rows[0]['imports_alone_mib']:.0f} MiB")
    largest = max(row["samples"] for row in rows)
    seconds = partition(largest, 10**4)
    print(f"{RANKS} ranks x {WORKERS} workers at {largest:,} samples: three steps, each slot once ({seconds:.1f} s for all {RANKS * WORKERS:,} together)")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    print("within the limits" if good else f"NOT within {LIMIT_SECONDS} s and {LIMIT_MIB:.0f} MiB")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
