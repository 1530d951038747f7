"""What was trained on, by step and slot, over ranks and starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtl.runs.trace import open_trace, read_trace


def test_nothing_is_written_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTL_TRACE", raising=False)
    assert open_trace(0) is None


def test_starts_that_differ_are_seen_and_torn_lines_are_passed_by(tmp_path: Path) -> None:
    (tmp_path / "rank-0-1.jsonl").write_text('{"step": 1, "slots": [[0, 7, "x"], [1, 8, "y"]]}\n{"step": 2, "slots": [[0, 9')
    (tmp_path / "rank-0-2.jsonl").write_text('{"step": 1, "slots": [[0, 7, "x"], [1, 8, "z"]]}\n{"step": 2, "slots": [[0, 9, "w"]]}\n')
    assert read_trace(tmp_path) == {1: {0: {(7, "x")}, 1: {(8, "y"), (8, "z")}}, 2: {0: {(9, "w")}}}
    assert read_trace(tmp_path / "none") == {}
