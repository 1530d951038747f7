"""`dtl report`: mistakes of the user."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import make_run

from dtl.errors import UserError


def test_mistakes_of_the_user_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.commands.report import run as command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison").mkdir()
    run = make_run(tmp_path / "runs/report", model=False)
    other = make_run(tmp_path / "runs/other", model=False)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for arguments, words in (
        ([str(tmp_path / "no")], "no such run folder"),
        (["reprt"], "no such run folder; did you mean 'runs/report'"),
        ([str(run), "--out", str(blocked / "x")], "choose another folder with --out"),
        ([str(run), str(other)], "comparison exists already and is not a comparison made by dtl; choose another folder with --out"),
        ([str(other), str(other)], "is given twice"),
        ([str(run), "--max-images", "0"], "--max-images must be at least 1, got 0"),
        ([str(run), "--seconds", "-1"], "--seconds must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=words):
            command(arguments)
