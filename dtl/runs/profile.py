"""`run.profile: STEPS`: what some steps of each phase spend their time on, as a trace of torch.profiler and one line.

The trace is the main process's, in runs/NAME/profile/PHASE.json, for chrome://tracing or ui.perfetto.dev. On a GPU the shares are those of its streams; on a
CPU those of the operators of this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dtl.text import counted

FOLDER = "profile"
_SKIPPED = 5
"""Steps of a phase before those that are traced, where it has so many: allocators, loader processes and cuDNN's search settle in these."""
_COMMUNICATION = ("nccl", "gloo", "c10d::", "mpi")
_COPIES = ("aten::copy_", "aten::_to_copy", "memcpy", "memset")
Span = tuple[float, float]


class StepProfiler:
    """Traces `steps` steps of one phase; `step` after each step of it, and `close` at the end of the phase in this start, also after an error."""

    def __init__(self, run: Path, phase: str, *, steps: int, left: int, device: torch.device, log: Callable[[str], None]) -> None:
        """`left`: the steps that the phase still has."""
        self.path, self.phase, self.device, self.log = run / FOLDER / f"{phase}.json", phase, device, log
        self._steps = min(steps, max(1, left - 1))
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        skipped = max(0, min(_SKIPPED, left - self._steps - 1))
        self._profile: Any = profile(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=schedule(wait=skipped, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=self._finish,
        )
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _finish(self, found: Any) -> None:
        writing = self.path.with_suffix(".writing")
        try:
            self.path.parent.mkdir(exist_ok=True)
            found.export_chrome_trace(str(writing))
            os.replace(writing, self.path)
            events = json.loads(self.path.read_bytes())["traceEvents"]
        except (OSError, ValueError, RuntimeError) as error:
            self.log(f"profile of phase {self.phase}: the trace could not be written to {self.path}: {error}")
            return
        shares = shares_of(events, on_gpu=self.device.type == "cuda")
        line = None if shares is None else shares.line("GPU" if self.device.type == "cuda" else "CPU")
        if shares is None:
            self.log(f"profile of phase {self.phase}: no whole step was traced; the phase needs at least {_SKIPPED + self._steps + 1} steps")
        else:
            self.log(f"profile of phase {self.phase}: {line}; trace {self.path} (chrome://tracing, ui.perfetto.dev)")


@dataclass(frozen=True)
class Shares:
    """Where the time of some steps went: microseconds, none counted twice."""

    steps: int
    span: float
    compute: float
    communication: float
    """While nothing computed."""
    hidden: float
    """Communication while something computed."""
    copies: float
    """While nothing computed or communicated."""
    recorded: bool
    """The profiler has recorded the device's work."""

    def line(self, device: str) -> str:
        if not self.recorded:
            return f"{counted(self.steps, 'step')} of {self.span / self.steps / 1000:.1f} ms; the profiler recorded no work of the {device} (CUPTI is missing)"
        idle = self.span - self.compute - self.communication - self.copies
        behind = f" (and {self.hidden / self.span:.0%} behind compute)" if self.hidden else ""
        return (
            f"{counted(self.steps, 'step')} of {self.span / self.steps / 1000:.1f} ms on the {device}: compute {self.compute / self.span:.0%}, "
            f"communication {self.communication / self.span:.0%}{behind}, copies {self.copies / self.span:.0%}, idle {idle / self.span:.0%}"
        )


def shares_of(events: Iterable[Mapping[str, Any]], *, on_gpu: bool) -> Shares | None:
    """Of the events of a chrome trace; None without a whole step."""
    steps: list[Span] = []
    spans: dict[str, list[Span]] = {"compute": [], "communication": [], "copies": []}
    device_kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op", "user_annotation")
    for event in events:
        if "dur" not in event:
            continue
        name, kind, span = str(event.get("name", "")).lower(), event.get("cat"), (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        if name.startswith("profilerstep") and kind == "user_annotation":
            steps.append(span)
        elif kind in device_kinds:
            if any(word in name for word in _COMMUNICATION):
                spans["communication"].append(span)
            elif name.startswith(_COPIES):
                spans["copies"].append(span)
            elif kind == "kernel" or name.startswith("aten::"):
                spans["compute"].append(span)
    if not steps:
        return None
    window = min(first for first, _ in steps), max(end for _, end in steps)
    compute, communication, copies = (_union(spans[name], window) for name in ("compute", "communication", "copies"))
    if not on_gpu:
        compute = _without(compute, copies)  # a copy is within the operator that calls for it
    alone = _without(communication, compute)
    return Shares(
        steps=len(steps),
        span=window[1] - window[0],
        compute=_length(compute),
        communication=_length(alone),
        hidden=_length(communication) - _length(alone),
        copies=_length(_without(_without(copies, compute), communication)),
        recorded=bool(compute),
    )


def _union(spans: Iterable[Span], window: Span) -> list[Span]:
    """Sorted, without overlaps, within `window`."""
    merged: list[Span] = []
    for first, end in sorted((max(first, window[0]), min(end, window[1])) for first, end in spans):
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


def _without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of `spans` is in none of `others`; both as `_union` gives them."""
    left, number = list[Span](), 0
    for first, end in spans:
        while number and others[number - 1][1] > first:
            number -= 1
        while number < len(others) and others[number][0] < end:
            low, high = others[number]
            if low > first:
                left.append((first, low))
            first = max(first, high)
            number += 1
        if first < end:
            left.append((first, end))
    return left


def _length(spans: Iterable[Span]) -> float:
    return sum(end - first for first, end in spans)
