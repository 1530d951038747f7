"""torch.profiler on some steps of a run, and what its device did in that time; benchmarks/first_day/speed.py starts a run with this in it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
PLACES = {"log line": "dtl.training.throughput:StepLog.step", "evaluation": "dtl.training.loop:Trainer._evaluate", "checkpoint": "dtl.training.loop:Saver.save"}
"""Where the host does something else than steps, by name; in a trace as "dtl: NAME"."""
_AFTER = 2000.0
"""Microseconds after such a place in which a gap that begins is still its doing: what was queued has ended, and the host has not queued more."""


def profiled() -> None:
    """$OVERLAP_STEPS steps from step $OVERLAP_FIRST (from 0) on, with what follows each of them; the result is written to $OVERLAP, the trace beside it.

    With $OVERLAP_PLACES the host is traced too, for the gaps by its places; that costs the host time, so shares are those without it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dtl.training.step import Stepper

    step, first = Stepper.step, int(os.environ["OVERLAP_FIRST"])
    end, result = first + int(os.environ["OVERLAP_STEPS"]), Path(os.environ["OVERLAP"])
    profiler = profile(activities=[ProfilerActivity.CUDA, *[ProfilerActivity.CPU] * bool(os.environ.get("OVERLAP_PLACES"))])
    for name, place in PLACES.items():
        _annotate(place, f"dtl: {name}")

    def watched(self: Stepper, *args: Any, **more: Any) -> float:
        if more["step"] in (first, end):
            torch.cuda.synchronize()
        if more["step"] == first:
            profiler.start()
        if more["step"] == end:
            profiler.stop()
            profiler.export_chrome_trace(str(result.with_suffix(".trace")))
            events = json.loads(result.with_suffix(".trace").read_bytes())["traceEvents"]
            result.write_text(json.dumps(shares(kernels(events)) | {"gaps": gaps(events)}))
        return step(self, *args, **more)

    Stepper.step = watched  # type: ignore[method-assign]


def _annotate(place: str, name: str) -> None:
    import importlib

    from torch.profiler import record_function

    module, _, path = place.partition(":")
    owner_name, _, method = path.partition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    real = getattr(owner, method)

    @functools.wraps(real)
    def annotated(*args: Any, **more: Any) -> Any:
        with record_function(name):
            return real(*args, **more)

    setattr(owner, method, annotated)


def _span(event: Mapping[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def kernels(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Interval]]:
    """Microseconds from and to, of what ran on the device. Annotations, which a trace has on the device too, reach over its gaps: they are left out."""
    found: dict[str, list[Interval]] = {"compute": [], "communication": [], "copies": []}
    for event in events:
        if event.get("cat") in ("gpu_memcpy", "gpu_memset"):
            found["copies"].append(_span(event))
        elif event.get("cat") == "kernel":
            found["communication" if "nccl" in str(event["name"]).lower() else "compute"].append(_span(event))
    return found


def gaps(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By place: how often the host was there, and the median and longest time that the device did nothing by it, in ms."""
    events = list(events)
    busy = union([interval for intervals in kernels(events).values() for interval in intervals])
    idle = [(before[1], after[0]) for before, after in itertools.pairwise(busy)]
    found: dict[str, dict[str, float]] = {}
    for name in PLACES:
        places = [_span(event) for event in events if event.get("cat") == "user_annotation" and event.get("name") == f"dtl: {name}"]
        spent = [length([gap for gap in idle if gap[0] < end + _AFTER and gap[1] > start]) / 1000 for start, end in places]
        found[name] = {"times": len(places), "median_ms": statistics.median(spent or [0.0]), "longest_ms": max(spent, default=0.0)}
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


def shares(spans: dict[str, list[Interval]]) -> dict[str, float]:
    """`idle`: of the time from the first kernel to the last one. `hidden`: of communication, and of copies, the share behind computation."""
    everything = union([interval for intervals in spans.values() for interval in intervals])
    if not everything:
        return {"device_events": 0}
    span, compute = everything[-1][1] - everything[0][0], union(spans["compute"])
    found = {"device_events": sum(map(len, spans.values())), "idle": 1 - length(everything) / span, "computing": length(compute) / span}
    found["longest_gap_ms"] = max((after[0] - before[1] for before, after in itertools.pairwise(everything)), default=0.0) / 1000
    for kind in ("communication", "copies"):
        own = union(spans[kind])
        both = length(own) + length(compute) - length(union([*own, *compute]))
        found[kind] = length(own) / span
        found[f"{kind}_hidden"] = both / length(own) if own else 1.0
    return found
