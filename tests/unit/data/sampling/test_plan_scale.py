"""A plan of a thousand million samples costs what one of a thousand does: the benchmark's own limits, and its 1,024 ranks of 8 workers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    file = Path(__file__).parents[4] / "benchmarks/plan_scale.py"
    spec = importlib.util.spec_from_file_location("plan_scale", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("balance", ["none", "uniform"])
def test_a_rank_at_mid_epoch_of_a_thousand_million_samples(scale: ModuleType, balance: str) -> None:
    """In a process of its own; the time limit is ten times the benchmark's, since a test machine may be busy."""
    row = scale.measured(10**9, 10**6, balance)
    assert row["to_the_middle_seconds"] < 10 * scale.LIMIT_SECONDS
    assert row["imports_alone_mib"] < row["peak_mib"] < scale.LIMIT_MIB


def test_what_8192_workers_of_1024_ranks_ask_for_is_each_global_batch_once(scale: ModuleType) -> None:
    assert scale.RANKS * scale.WORKERS == 8192
    scale.partition(10**8, 10**4)
