"""A phase that spoils what the one before has learned is told."""

from __future__ import annotations

from typing import Any

from dtl.training.publish import fell_behind


def row(phase: str, top1: float | None, task: str = "classify") -> dict[str, Any]:
    return {"phase": phase, "task": task, "val": None if top1 is None else {"top1": top1}}


def test_it_is_told() -> None:
    line = fell_behind([row("head", 0.944), row("all", 0.731)], lr=0.01)
    assert line is not None
    assert line.startswith("phase all ended below phase head (73.1 % after 94.4 %)")
    assert "--phases.all.lr 0.001" in line


def test_it_is_not_told_where_nothing_was_lost() -> None:
    assert fell_behind([row("head", 0.944), row("all", 0.94)], lr=0.01) is None, "within a point"
    assert fell_behind([row("head", 0.9), row("all", 0.95)], lr=0.01) is None
    assert fell_behind([row("all", 0.3)], lr=0.01) is None
    assert fell_behind([row("pretext", 0.9, "rotate"), row("all", 0.3)], lr=0.01) is None, "another task's score is no measure"
    assert fell_behind([row("head", 0.9), row("all", None)], lr=0.01) is None, "no validation data"
