"""The page of several runs: which runs it takes, where it is written, what it lists."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from harness import history
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
    for words in ("a-s0", "a-s1", "mean and range of 2 seeds", "90.05 % (90.00 to 90.10)", "phases.all.lr", "With several seeds, the line is their mean"):
        assert words in page.text, words
    assert not [line for line in logged if "has not begun" in line]


def test_runs_that_differ_in_names_only(tmp_path: Path) -> None:
    first = runs(tmp_path / "first", "one")
    second = runs(tmp_path / "second", "two")
    page = Page.read(make_comparison(first + second, out=tmp_path / "out", log=lambda line: None))
    assert "Only the names and seeds differ." in page.text


def test_twelve_runs_are_one_table_sorted_by_top1_with_a_column_for_each_setting_that_differs(tmp_path: Path) -> None:
    """Also as a file, with numbers as they are; epochs are counted as in the run's own lines, over all of its phases."""
    made = []
    for number in range(12):
        phase = {**SHORT["all"], "lr": 0.0123456789 * (number + 1), "optimizer": "adamw" if number % 2 else "sgd"}
        config = make_config(f"run-{number}", phases={"head": {"train": "head", "epochs": 2}, "all": phase}, seed=(5 * number) % 12)
        made.append(make_run(tmp_path / f"run-{number}", config, model=False))
    page = Page.read(make_comparison(made, out=tmp_path / "out", table_csv=tmp_path / "t.csv", log=lambda line: None))
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    columns = ["run", "seed", "phases.all.lr", "phases.all.optimizer", "best_top1", "best_epoch", "last_top1", "lowest_loss", "steps", "seconds"]
    assert list(rows[0]) == columns
    assert [int(row["seed"]) for row in rows] == list(range(11, -1, -1)), "a greater seed has a greater top1 here"
    for row in rows:
        number = int(row["run"].removeprefix("run-"))
        assert float(row["phases.all.lr"]) == 0.0123456789 * (number + 1)
        assert row["phases.all.optimizer"] == ("adamw" if number % 2 else "sgd")
        (event,) = [event for event in history(tmp_path / row["run"]) if event["event"] == "val" and event["step"] == 36]
        assert (float(row["best_top1"]), int(row["best_epoch"]), int(row["steps"])) == (event["top1"], event["epoch"], 36)
    places = [page.text.index(f"{row['run']} {row['seed']} ") for row in rows]
    assert places == sorted(places)
    assert "12 runs" in page.text


def test_many_settings_that_differ_stand_in_rows(tmp_path: Path) -> None:
    others = {"lr": 0.5, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1, "gamma": 0.5, "warmup": 0.5, "label_smoothing": 0.1, "mixup": 0.2, "ema": 0.9}
    other = make_run(tmp_path / "other", make_config("other", phases={"all": {**SHORT["all"], **others}}), model=False)
    page = Page.read(make_comparison([*runs(tmp_path, "one"), other], out=tmp_path / "out", table_csv=tmp_path / "t.csv", log=lambda line: None))
    assert "9 settings differ, and 8 of them have a column here; all have one in the file of `--table-csv FILE`." in page.text
    assert "Settings that differ" in page.text
    header = (tmp_path / "t.csv").read_text().splitlines()[0].split(",")
    assert {f"phases.all.{name}" for name in others} < set(header)


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
