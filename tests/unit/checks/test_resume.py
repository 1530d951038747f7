"""What of two runs is compared: weights, end, and history without times. tests/resilience kills real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtl.checks.resume import outcome


def finished(folder: Path, *events: dict[str, Any], weights: bytes = b"w", state: str = "done") -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_bytes(weights)
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 9, "time": 12.0}))
    return folder


def test_times_and_advice_are_no_difference_and_all_else_is(tmp_path: Path) -> None:
    first = finished(tmp_path / "a", {"step": 1, "loss": 2.0, "seconds": 3.0}, {"note": "limit", "line": "slow"}, {"step": 2, "images_per_second": 7})
    second = finished(tmp_path / "b", {"step": 1, "loss": 2.0, "seconds": 9.0, "data_wait": 0.5}, {"step": 2, "memory_gib": 1.0})
    assert outcome(first) == outcome(second)
    for name, changed in (
        ("weights", finished(tmp_path / "c", {"step": 1, "loss": 2.0}, {"step": 2}, weights=b"v")),
        ("history", finished(tmp_path / "d", {"step": 1, "loss": 2.1}, {"step": 2})),
        ("state", finished(tmp_path / "e", {"step": 1, "loss": 2.0}, {"step": 2}, state="stopped")),
    ):
        found, expected = outcome(changed), outcome(first)
        assert [key for key in found if found[key] != expected[key]] == [name]
