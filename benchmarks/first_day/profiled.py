"""torch.profiler on some steps of a run, and what its device did in that time; benchmarks/first_day/speed.py starts a run with this in it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


def profiled() -> None:
    """From step 1 + OVERLAP_STEPS / 2 on, for OVERLAP_STEPS steps; the result is written to $OVERLAP."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dtl.training.step import Stepper

    step, steps = Stepper.step, int(os.environ["OVERLAP_STEPS"])
    first, profiler = 1 + steps // 2, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def watched(self: Stepper, *args: Any, **more: Any) -> float:
        if more["step"] == first:
            torch.cuda.synchronize()
            profiler.start()
        lr = step(self, *args, **more)
        if more["step"] == first + steps - 1:
            torch.cuda.synchronize()
            profiler.stop()
            Path(os.environ["OVERLAP"]).write_text(json.dumps(shares(_kernels(profiler))))
        return lr

    Stepper.step = watched  # type: ignore[method-assign]


def _kernels(profiler: Any) -> dict[str, list[Interval]]:
    """Microseconds from and to, of what ran on the device."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    found: dict[str, list[Interval]] = {"compute": [], "communication": [], "copies": []}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            name = event.name.lower()
            kind = "communication" if "nccl" in name else "copies" if "memcpy" in name else "compute"
            found[kind].append((event.time_range.start, event.time_range.end))
    return found


def union(intervals: list[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def shares(kernels: dict[str, list[Interval]]) -> dict[str, float]:
    """`idle`: of the time from the first kernel to the last one. `hidden`: of communication, and of copies, the share behind computation."""
    everything = union([interval for intervals in kernels.values() for interval in intervals])
    if not everything:
        return {"device_events": 0}
    span, compute = everything[-1][1] - everything[0][0], union(kernels["compute"])
    found = {"device_events": sum(map(len, kernels.values())), "idle": 1 - length(everything) / span, "computing": length(compute) / span}
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(everything)]
    found["longest_gap_ms"] = max(gaps, default=0.0) / 1000
    for kind in ("communication", "copies"):
        own = union(kernels[kind])
        both = length(own) + length(compute) - length(union([*own, *compute]))
        found[kind] = length(own) / span
        found[f"{kind}_hidden"] = both / length(own) if own else 1.0
    return found
