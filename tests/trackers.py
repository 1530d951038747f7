"""Trackers for tests: one without an account, that logs steps, and the lines of history.jsonl read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from dtl.runs.console import Console
from dtl.runs.tracker import Tracker


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    tracker.start_phase("head", first_step=0, num_steps=20, step=first - 1)
    for step in range(first, last + 1):
        tracker.train(phase="head", epoch=0, step=step, loss=1 / step, lr=0.1, images_per_second=100.0, data_wait=0.01)
        if step % 10 == 0:
            tracker.val(phase="head", epoch=0, step=step, loss=0.5, top1=step / 100, top5=1.0, num_samples=50)


def make_tracker(run_dir: Path, **options: Any) -> Tracker:
    return Tracker(run_dir, is_main=True, console=options.pop("console", Console(stream=io.StringIO())), **options)
