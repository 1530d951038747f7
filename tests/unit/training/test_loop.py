"""Between two log lines the loop asks the device for no value: on a GPU each would make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.loop import CASES, Enough, run_dtl

# What reads a tensor's value: item(), float(), bool(), an `if` on a tensor, nonzero's size.
ASKS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::unique")
GATHERS = "aten::stack"


def test_no_value_is_asked_for_between_log_lines() -> None:
    counts: dict[str, dict[str, int]] = {}

    def stream(batches: list[Any]) -> Iterator[list[Any]]:
        for name, steps in (("begin", 11), ("quiet", 7), ("with a log line", 10)):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(steps):
                    yield [replace(batch) for batch in batches]
            counts[name] = _counted(seen)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            batches[0].weights.sum().item()
        counts["asked by this test"] = _counted(seen)
        raise Enough

    run_dtl(CASES[0], stream)
    assert sum(count for name, count in counts["quiet"].items() if "backward" in name.lower()) >= 7, "the profiler saw the steps"
    assert counts["asked by this test"]["aten::item"] == 1, "the profiler would see it"
    for name in ("quiet", "with a log line"):
        assert not [asked for asked in counts[name] if asked in ASKS]
    # The losses of a log line come to the host together.
    assert counts["quiet"].get(GATHERS, 0) == 0
    assert counts["with a log line"][GATHERS] == 1


def _counted(seen: profile) -> dict[str, int]:
    wanted = (*ASKS, GATHERS)
    return {event.key: event.count for event in seen.key_averages() if event.key in wanted or "backward" in event.key.lower()}
