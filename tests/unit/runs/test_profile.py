"""`run.profile`: a made-up trace is divided into shares that add up, and a real run leaves its trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness import history, run
from recipes import weights_hash, write_recipe

from dtl.runs.profile import shares_of


def event(cat: str, name: str, first: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": first, "dur": end - first}


STEPS = [event("user_annotation", "ProfilerStep#6", 0, 1000), event("user_annotation", "ProfilerStep#7", 1000, 2000), {"ph": "M", "name": "process_name"}]


def test_a_gpus_time_is_divided_once() -> None:
    shares = shares_of(
        [
            *STEPS,
            event("kernel", "sm90_gemm", -500, 200),  # of the step before: what lies in the window counts
            event("kernel", "sm90_gemm", 100, 1000),  # another stream, overlapping
            event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 800, 1300),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1250, 1500),
            event("gpu_memset", "Memset (Device)", 1900, 2400),
            event("cpu_op", "aten::conv2d", 0, 2000),
        ],
        on_gpu=True,
    )
    assert shares is not None
    assert (shares.steps, shares.span, shares.compute, shares.communication, shares.hidden, shares.copies) == (2, 2000, 1000, 300, 200, 300)
    assert shares.line("GPU") == "2 steps of 1.0 ms on the GPU: compute 50%, communication 15% (and 10% behind compute), copies 15%, idle 20%"


def test_on_a_cpu_a_copy_is_no_computing_and_waiting_for_data_is_idle() -> None:
    shares = shares_of(
        [
            *STEPS,
            event("cpu_op", "aten::to", 100, 300),
            event("cpu_op", "aten::copy_", 150, 300),
            event("user_annotation", "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 300, 900),
            event("cpu_op", "aten::conv2d", 900, 1900),
            event("user_annotation", "gloo:all_reduce", 1700, 2000),
        ],
        on_gpu=False,
    )
    assert shares is not None
    assert shares.line("CPU") == "2 steps of 1.0 ms on the CPU: compute 52%, communication 5% (and 10% behind compute), copies 8%, idle 35%"


def test_what_was_not_recorded_is_not_called_idle() -> None:
    assert shares_of([], on_gpu=False) is None
    shares = shares_of([*STEPS, event("cpu_op", "aten::conv2d", 0, 2000)], on_gpu=True)
    assert shares is not None
    assert shares.line("GPU") == "2 steps of 1.0 ms; the profiler recorded no work of the GPU (CUPTI is missing)"


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_leaves_a_trace_of_each_phase_and_is_otherwise_the_same(tmp_path: Path, world: int) -> None:
    words = ["--config", str(write_recipe(tmp_path))]
    job = run([*words, "--run.profile", "3"], cwd=tmp_path, world=world)
    found = re.findall(r"profile of phase (\w+): (\d) steps of [\d.]+ ms on the CPU: compute (\d+)%, communication .*, idle \d+%; trace (\S+)", job.err())
    assert [(phase, steps) for phase, steps, *_ in found] == [("pretext", "3"), ("head", "3"), ("all", "3")]
    for phase, _, compute, trace in found:
        assert int(compute) > 0
        names = {event.get("name") for event in json.loads((tmp_path / trace).read_bytes())["traceEvents"]}
        assert trace == f"runs/tiny/profile/{phase}.json"
        assert "aten::addmm" in names
        assert any("gloo" in str(name) for name in names) == (world > 1)
    run([*words, "--run.name", "plain"], cwd=tmp_path, world=world)
    assert weights_hash(tmp_path / "runs/plain") == weights_hash(tmp_path / "runs/tiny")
    assert history(tmp_path / "runs/plain") == history(tmp_path / "runs/tiny")
