"""Counted things, and what a mistyped name, path or option may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtl.cli import main
from dtl.text import Column, counted, csv_line, near_path, near_run, printable, rate, some, table


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (1437, "image", "1,437 images"),
        (1, "loader process", "1 loader process"),
        (2, "loader process", "2 loader processes"),
        (3, "class", "3 classes"),
        (1.0, "epoch", "1 epoch"),
        (1.5, "epoch", "1.5 epochs"),
    ],
)
def test_a_number_and_its_noun_agree(number: float, what: str, text: str) -> None:
    assert counted(number, what) == text


@pytest.mark.parametrize(("number", "text"), [(0.043, "0.043"), (0.4321, "0.43"), (3.14, "3.1"), (9.94, "9.9"), (9.96, "10"), (12.4, "12"), (1234.5, "1,234")])
def test_rates(number: float, text: str) -> None:
    assert rate(number) == text


def test_a_long_list_ends_in_a_count() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(9)]) == "0, 1, 2, 3, 4 and 4 more"
    assert some(["a", "b", "c"], limit=2, quoted=True) == "'a', 'b' and 1 more"


def test_a_mistyped_path_is_shown_whole_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/train/ants").mkdir(parents=True)
    (tmp_path / "runs/flowers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert near_path(Path("phtos/trian")) == "; did you mean 'photos/train'?"
    assert near_path(tmp_path / "photos/trian") == f"; did you mean '{tmp_path}/photos/train'?"
    assert near_path(Path("../") / tmp_path.name / "photo") == f"; did you mean '../{tmp_path.name}/photos'?"
    assert near_path(Path("photos/zzz")) == ""
    assert near_path(Path("digit"), others=["digits"]) == "; did you mean 'digits'?"
    for typed in ("flowers", "flower", "run/flowers", "runs/flower"):
        assert near_run(Path(typed)) == "; did you mean 'runs/flowers'?", typed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate runs/x --data photos", "unknown option --data; did you mean --data.val?"),
        ("predict m p --otu f.csv", "unknown option --otu; did you mean --out?"),
        ("models a b", "b is not expected here"),
        ("report", "the following arguments are required: RUN"),
        ("predict m p --zzzzzz", "unknown option --zzzzzz (dtl predict --help lists"),
        ("train --data photos", "data is a section, not a single value (got 'photos'); its settings are data.train, val,"),
    ],
)
def test_a_mistyped_command_line_is_one_line(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("dtl: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_table_is_plain_text_and_wraps_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    columns = [Column("class", most=8), Column("images", right=True), Column("notes")]
    rows = [["ant", "1,234", "[bold]as it is[/] " * 20], ["a very long name", "5", ""]]
    lines = table(columns, rows).splitlines()
    assert lines[0] == "class     images  notes"
    assert lines[1].startswith("ant        1,234  [bold]as it is[/] [bold]as")
    assert lines[2] == "a very …       5"
    assert len(lines) == 3
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    wrapped = table(columns, rows).splitlines()
    assert len(wrapped) > 5
    assert max(map(len, wrapped)) <= 60


def test_a_class_name_cannot_forge_a_row_of_a_table() -> None:
    lines = table([Column("class"), Column("images")], [("x\n\x1b[2Kall is well", "3")]).splitlines()
    assert [line.split() for line in lines] == [["class", "images"], ["x\\n\\x1b[2Kall", "is", "well", "3"]]


def test_letters_of_all_languages_stay_as_they_are() -> None:
    assert printable("Löwenzahn 蒲公英 هندباء 👩‍🌾") == "Löwenzahn 蒲公英 هندباء 👩‍🌾"


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        (["=1+1.png", "-1", -1, 0.25, None], "'=1+1.png,'-1,-1,0.25,\n"),
        (["'=x", "a;=1", 'say "a"', "a,b"], '\'\'=x,"a;=1","say ""a""","a,b"\n'),
        (["@SUM(A1)", "\tx", "plain", "x=1"], "'@SUM(A1),\"'\tx\",plain,x=1\n"),
    ],
)
def test_csv_cells_are_text_or_numbers_but_no_formulas(cells: list[object], line: str) -> None:
    assert csv_line(cells) == line
