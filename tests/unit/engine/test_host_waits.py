"""Between two log lines the loop asks the device for no value: on a GPU each would make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.loop import CASES, Enough, run_dtl

# What reads a tensor's value: item(), float(), bool(), an `if` on a tensor, nonzero's size.
ASKS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::unique")


def test_no_value_is_asked_for_between_log_lines() -> None:
    counts: dict[str, dict[str, int]] = {}

    def stream(batches: list[Any]) -> Iterator[list[Any]]:
        for name, steps in (("begin", 11), ("quiet", 7), ("with a log line", 10)):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(steps):
                    yield [replace(batch) for batch in batches]
            counts[name] = {event.key: event.count for event in seen.key_averages() if event.key in ASKS or "backward" in event.key.lower()}
        raise Enough

    run_dtl(CASES[0], stream)
    assert sum(count for name, count in counts["quiet"].items() if name not in ASKS) >= 7, "the profiler saw the steps"
    assert not [name for name in counts["quiet"] if name in ASKS]
    # The loss of a log line and its sum over ranks: a few values, not one a step.
    assert 1 <= counts["with a log line"].get("aten::item", 0) <= 4
