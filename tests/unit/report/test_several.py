"""The page of several runs: which runs it takes, where it is written, what it lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from page_reader import Page
from report_runs import make_config, make_run

from dtl.errors import UserError
from dtl.report.several import make_comparison

SHORT = {"all": {"train": "all", "epochs": 1, "lr": 0.02}}


def runs(folder: Path, *names: str) -> list[Path]:
    return [make_run(folder / name, make_config(name, phases=SHORT, seed=number), model=False) for number, name in enumerate(names)]


def test_seeds_and_their_mean_stand_on_the_page(tmp_path: Path) -> None:
    logged: list[str] = []
    made = [*runs(tmp_path, "a-s0", "a-s1"), make_run(tmp_path / "b", make_config("b", phases={"all": {**SHORT["all"], "lr": 0.5}}), model=False)]
    page = Page.read(make_comparison(made, out=tmp_path / "out", log=logged.append))
    page.check_self_contained()
    for words in ("a-s0", "a-s1", "mean and standard deviation of 2 seeds", "90.05 ± 0.07 %", "phases.all.lr", "With several seeds, the line is their mean"):
        assert words in page.text, words
    assert not [line for line in logged if "has not begun" in line]


def test_runs_that_differ_in_names_only(tmp_path: Path) -> None:
    first = runs(tmp_path / "first", "one")
    second = runs(tmp_path / "second", "two")
    page = Page.read(make_comparison(first + second, out=tmp_path / "out", log=lambda line: None))
    assert "Only the names differ." in page.text


def test_many_curves_have_no_table_of_differences(tmp_path: Path) -> None:
    phases = [{"all": {**SHORT["all"], "lr": 0.01 * number}} for number in range(1, 10)]
    made = [make_run(tmp_path / name, make_config(name, phases=one), model=False) for name, one in zip("abcdefghi", phases)]
    page = Page.read(make_comparison(made, out=tmp_path / "out", log=lambda line: None))
    assert "Not listed for more than 8 curves." in page.text
    assert "9 runs" in page.text


def test_a_run_twice_is_refused_by_any_of_its_names(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "run")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match=r"is given twice$"):
        make_comparison([run, tmp_path / "link"], out=tmp_path / "out", log=lambda line: None)


def test_runs_that_never_began_are_left_out_and_named(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "run")
    for name in ("empty", "empty2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({"state": "failed", "why": "input: no such file", "step": 0}))
    logged: list[str] = []
    make_comparison([run, tmp_path / "empty"], out=tmp_path / "out", log=logged.append)
    assert logged[0].startswith(f"left out of the comparison: {tmp_path / 'empty'}: ")
    with pytest.raises(UserError, match=r"^nothing to compare: none of these runs has started training$"):
        make_comparison([tmp_path / "empty", tmp_path / "empty2"], out=tmp_path / "out", log=logged.append)


def test_a_folder_that_holds_something_else_is_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = runs(tmp_path, "a", "b")
    page = make_comparison(made, out=None, log=lambda line: None)
    assert page.parent == Path("comparison")
    assert make_comparison(made, out=None, log=lambda line: None) == page, "a comparison is replaced"
    page.unlink()
    with pytest.raises(UserError, match=r"^comparison exists already and is not a comparison made by dtl; choose another folder with --out$"):
        make_comparison(made, out=None, log=lambda line: None)
