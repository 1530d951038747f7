"""History as a table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dtl.errors import UserError
from dtl.report.csv_file import write_csv


def test_runs_of_different_columns_share_one_table_and_a_torn_line_is_passed_by(tmp_path: Path) -> None:
    for name, lines in (
        ("one", '{"event": "train", "step": 1, "loss": 0.5}\n{"event": "run"}\n{"event": "val", "st'),
        ("two", '{"event": "val", "step": 2, "top1": 1.0, "list": [1]}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_text(lines)
    assert write_csv([tmp_path / "one", tmp_path / "two"], tmp_path / "out.csv") == 2
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "event", "phase", "epoch", "step", "loss", "top1"]
    assert [(row["run"], row["event"], row["step"], row["loss"], row["top1"]) for row in rows] == [
        ("one", "train", "1", "0.5", ""),
        ("two", "val", "2", "", "1.0"),
    ]


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a run folder"):
        write_csv([tmp_path / "none"], tmp_path / "out.csv")
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_csv([tmp_path], tmp_path / "no/folder/out.csv")
