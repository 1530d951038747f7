"""Looks at a test set: different weights count, by the content of the images, over all runs of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtl.runs.looks import LOOKS_NAME, count_looks, describe_look, note_look


def test_different_weights_count_over_runs_and_equal_ones_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert count_looks(tmp_path, "t") == 0
    assert note_look(tmp_path / "a", "t", weights="1", step=5) == 1
    assert note_look(tmp_path / "b", "t", weights="2", step=5) == 2
    assert note_look(tmp_path / "b", "t", weights="2", step=5) == 2
    assert note_look(tmp_path / "b", "other", weights="2", step=5) == 1
    assert len((tmp_path / "b" / LOOKS_NAME).read_text().splitlines()) == 2
    assert describe_look(2, tmp_path) == f"look 2 at this test set by runs in {tmp_path}/"


def test_the_runs_of_folds_count_with_those_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b-folds/refit", "b-folds/fold-1"):
        (tmp_path / name).mkdir(parents=True)
    assert note_look(tmp_path / "a", "t", weights="1", step=5) == 1
    assert note_look(tmp_path / "b-folds/refit", "t", weights="2", step=5) == 2
    assert note_look(tmp_path / "b-folds/fold-1", "fold", weights="3", step=5) == 1
    assert count_looks(tmp_path, "t") == count_looks(tmp_path / "b-folds", "t") == 2
    assert describe_look(2, tmp_path / "b-folds") == f"look 2 at this test set by runs in {tmp_path}/"


def test_a_torn_line_is_read_past_and_a_file_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    note_look(tmp_path / "a", "t", weights="1", step=5)
    with open(tmp_path / "a" / LOOKS_NAME, "a") as file:
        file.write('{"test": "t", "wei')
    assert count_looks(tmp_path, "t") == 1
    assert note_look(tmp_path / "gone", "t", weights="2", step=1) is None
    assert "this look at the test set is not counted" in capsys.readouterr().err
