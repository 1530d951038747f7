"""The reader of lists: every line, field and column is accounted for."""

from __future__ import annotations

import csv
import io
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtl.data.sources.list_file import Listing, list_text, parse_list, read_list
from dtl.errors import UserError
from dtl.text import from_csv_cell

_DELIMITERS = st.sampled_from([",", ";", "\t"])
_LABELS = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
_NOTES = st.text(string.ascii_letters + " ,;\t'\"\n", max_size=20)
_SPLITS = {"train": "train", "Training": "train", "val": "val", "valid": "val", "VALIDATION": "val", "test": "test", "dev": "val"}


def parsed(text: str, *, labelled: bool = True, origin: str = "list.csv", **more: Any) -> Listing:
    return parse_list(text, origin=origin, folder=Path("/nowhere"), labelled=labelled, **more)


def rows(listing: Listing) -> list[tuple[str, str, str]]:
    numbers = range(len(listing.lines))
    return [(listing.paths[row], listing.label_names[listing.labels[row]], listing.split_names[listing.splits[row]]) for row in numbers]


@st.composite
def _tables(draw: Any) -> tuple[str, list[tuple[str, str, str]], list[int]]:
    """The text of a CSV list, its rows, and the line at which each begins."""
    delimiter, end = draw(_DELIMITERS), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    columns = draw(st.permutations(["path", "label", "split", "note"]))
    found, lines, text = [], [], io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if end == "\r" else draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))  # csv quotes no \n before \r
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(columns)
    for number in range(draw(st.integers(1, 6))):
        text.write(draw(st.sampled_from(["", "", end, f" {end}"])))
        lines.append(len(io.StringIO(text.getvalue(), newline="").readlines()) + 1)
        split, label = draw(st.sampled_from(sorted(_SPLITS))), draw(_LABELS)
        cells = {"path": f"img/{number}.png", "label": label, "split": split, "note": draw(_NOTES)}
        writer.writerow([cells[column] for column in columns])
        found.append((cells["path"], from_csv_cell(label.strip()), _SPLITS[split]))
    return text.getvalue(), found, lines


def _tried(text: str) -> tuple[Listing | None, str]:
    try:
        return parsed(text), ""
    except UserError as error:
        return None, str(error)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(_tables())
def test_every_row_that_was_written_is_read(table: tuple[str, list[tuple[str, str, str]], list[int]]) -> None:
    text, written, lines = table
    listing, refused = _tried(text)
    if listing is None:  # a note with a line break that looks like a row is refused, never taken for none
        assert "look like rows" in refused
        return
    assert (rows(listing), listing.lines.tolist()) == (written, lines)
    assert listing.notes[-1] == "column not used: 'note'"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_tables(), st.data())
def test_a_quote_too_many_or_too_few_hides_no_row(table: tuple[str, list[tuple[str, str, str]], list[int]], data: st.DataObject) -> None:
    """The list is refused, or each of its images is a row."""
    text, written, _ = table
    assume("\n" not in "".join(label for _, label, _ in written))
    quotes = [at for at, letter in enumerate(text) if letter == '"']
    if quotes and data.draw(st.booleans()):
        at = data.draw(st.sampled_from(quotes))
        changed = text[:at] + text[at + 1 :]
    else:
        at = data.draw(st.integers(0, len(text)))
        changed = f'{text[:at]}"{text[at:]}'
    listing, refused = _tried(changed)
    assert "list.csv, line " in refused if listing is None else len(listing.lines) == len(written)


_PLAIN = st.text(string.ascii_letters + string.digits + "_-.é", min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.just(""), st.just("  "), st.tuples(_PLAIN, _PLAIN)), max_size=8),
    st.sampled_from([" ", "  ", "\t", "\t\t"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_line_of_a_plain_list_is_a_row_or_blank(lines: list[Any], between: str, end: str) -> None:
    text = end.join(line if isinstance(line, str) else f"img/{line[0]}.png{between}{line[1]}" for line in lines)
    written = [(number, f"img/{line[0]}.png", line[1]) for number, line in enumerate(lines, start=1) if not isinstance(line, str)]
    listing = parsed(text, origin="list.txt")
    assert [(int(line), path, label) for line, (path, label, _) in zip(listing.lines, rows(listing))] == written


@pytest.mark.parametrize(
    ("column", "values", "splits"),
    [
        ("split", "train val valid Validation TEST dev", "train val val val test val"),
        ("ml_use", "TRAINING VALIDATION TEST", "train val test"),
        ("subset", "training testing", "train test"),
        ("is_valid", "True False 0 1 true yes NO 1.0", "val train train val val val train val"),
        ("is_test", "1 0", "test train"),
        ("is_training", "1 0", "train test"),
    ],
)
def test_columns_that_name_splits(column: str, values: str, splits: str) -> None:
    text = f"path,label,{column}\n" + "".join(f"{row}.png,cat,{value}\n" for row, value in enumerate(values.split()))
    listing = parsed(text)
    assert [split for _, _, split in rows(listing)] == splits.split()
    assert listing.split_names == tuple(name for name in ("train", "val", "test") if name in splits.split())
    counts = ", ".join(f"{splits.split().count(name)} {name}" for name in listing.split_names)
    assert listing.notes == (f"column '{column}': {counts}",)


def test_columns_that_are_not_used_are_named_in_one_line() -> None:
    listing = parsed("filename,label,width,,Path To\na.png,cat,3,,x\n")
    assert listing.notes == ("columns not used: 'width', '(no name)', 'path_to'",)
    listing = parsed("filename,label,Usage,x\na.png,cat,Training,\nb.png,cat,test,\n")
    assert listing.notes == ("column 'usage' names splits (test, train), but all rows are used; rename it to split to keep them apart", "column not used: 'x'")


def test_a_prediction_needs_paths_alone() -> None:
    """Of a list made for something else: no label, a split of another name, a column path in another place."""
    listing = parsed("label,path,split\n,a.png,\nx,b.png,holdout\n", labelled=False, paths_only=True)
    assert [path for path, _, _ in rows(listing)] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('path,label\na.png,cat\nb.png,"dog\nc.png,cat\n', 'list.csv, line 3: a quote opens here that is not closed: `b.png,"dog`'),
        ('path,label\na.png,cat\n"b.png,dog\n"c.png",cat\n', 'list.csv, line 3: a quote opens here that is not closed: `"b.png,dog`'),
        ('path,label,x\na.png,cat,"one\ntwo"\nb.png,dog,"three\nfour\n', 'line 4: a quote opens here that is not closed: `b.png,dog,"three`'),
        ('path,label,x\na.png,cat,"one\ntwo", "three\nb.png,dog,x\n', 'line 2: 4 fields where|line 3: a quote opens here that is not closed: `two", "three`'),
        (
            'path,label\na.png,"cat\nb.png,dog\nc.png,cat"\n',
            "line 2: a quote opens here that is only closed in line 4, and between them are lines that look like rows",
        ),
        ('path,label,x\na.png,cat,"x\nb.png,dog,y\nc.png,cat,z"\n', "line 2: a quote opens here that is only closed in line 4"),
        ('path,label,x\n1,cat,"x\n2,dog,y\n3,cat,z"\n4,dog,x\n', "line 2: a quote opens here that is only closed in line 4"),
        ('path,label\n"a".png,cat\n', 'line 2: text follows the closing quote of a cell: `"a".png,cat`'),
        ("path,label\n" + "x" * 200_000 + ",cat\n", "line 2: not readable as CSV: field larger than field limit"),
        ("path,label\na.png,cat\nb.png\n", "line 3: 1 field where the header names 2: `b.png`"),
        ("path,label\na.png,cat,x\n", "line 2: 3 fields where the header names 2: `a.png,cat,x`; put a cell that holds the separator in quotes"),
        ("\n\npath,label\n\na.png,\n", "line 5: no label: `a.png,`"),
        ('path,label,"x\na.png,cat,y\nb.png,dog,"\n', "line 1: a quote opens in the header that is only closed in line 3"),
        ("path,label,label\n", "line 1: the header names the column 'label' twice"),
        ("path,label,split,is_valid\na.png,cat,train,0\n", "line 1: the columns 'split', 'is_valid' both name the split of an image"),
        ("path,label,split\na.png,cat,trian\n", "line 2: 'trian' in column 'split' is not the name of a split; did you mean 'train'?"),
        ("path,label,split\na.png,cat,1\n", r"line 2: '1' in column 'split' is not the name of a split \(train, training, val"),
        ("path,label,is_valid\na.png,cat,\n", "line 2: '' in column 'is_valid' is neither true nor false"),
        ("a.png,cat\n", "line 1: a CSV list begins with a header .* put the line `path,label` before it"),
        ("\nimg_name;breed\na.png;cat\n", r"line 2: a CSV list begins .* rename the column of paths \(read are path, .*\) and that of labels \(read are label"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.png", "list.txt, line 2: no label: `b.png`; a line is `path label`$"),
        ("b.png,cat", r"line 2: no label: `b.png,cat`; .* if commas separate the columns, begin with a header that names them \(path,label\)"),
        ("b.png;cat", r"if semicolons separate the columns, begin with a header that names them \(path;label\)"),
        ("b.png\tcat\tx", "line 2: 3 fields between tabs"),
        ('b.png "cat', 'line 2: a quote opens in the label that is not closed: `b.png "cat`'),
    ],
)
def test_a_line_without_a_path_and_a_label(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(f"a.png cat\n{line}\n", origin="list.txt")


def test_quotes_in_a_list_of_lines() -> None:
    listing = parsed('"a b.png" \'cat\'\nb.png\t"black dog"\nc.png 32"\nd.png o\'brien\n', origin="list.txt")
    assert [(path, label) for path, label, _ in rows(listing)] == [("a b.png", "cat"), ("b.png", "black dog"), ("c.png", '32"'), ("d.png", "o'brien")]


def test_cells_with_line_breaks_that_are_no_rows() -> None:
    listing = parsed('path,label,caption\na.png,cat,"one\ntwo, three"\n"b\n.png",dog,"say ""x"""\nc.png,cat,\n')
    assert [path for path, _, _ in rows(listing)] == ["a.png", "b\n.png", "c.png"]
    assert listing.lines.tolist() == [2, 4, 6]


@pytest.mark.parametrize("extra", ["", ",", ",,", ", "])
def test_empty_cells_at_the_end_are_none(extra: str) -> None:
    assert rows(parsed(f"path,label\na.png,cat{extra}\n")) == [("a.png", "cat", "all")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "path,label\na.png,caf\u00e9\n".encode("latin-1"),
            r"line 2 has the byte 0xe9\); if a spreadsheet wrote it, convert it: iconv -f WINDOWS-1252 -t UTF-8",
        ),
        ("path,label\na.png,cat\n".encode("utf-16"), "but UTF-16; .* iconv -f UTF-16 -t UTF-8"),
        (b"PK\x03\x04xlsx", "but an Excel workbook or another archive; save it as CSV"),
        (b"\x89PNG\0", "but binary data"),
    ],
)
def test_what_is_no_utf8_text(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(UserError, match=f"list.csv is not a list: it is not UTF-8 text.*{message}"):
        read_list(tmp_path / "list.csv", labelled=True, max_bytes=1000)


@pytest.mark.parametrize(("old", "name"), [("latin-1", "WINDOWS-1252"), ("utf-16", "UTF-16")])
def test_the_conversion_that_is_named_makes_a_list_of_it(old: str, name: str) -> None:
    text = "path,label\na.png,caf\u00e9\n"
    assert text.encode(old).decode(name).encode("utf-8").decode("utf-8-sig") == text


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfpath,label\na.png,cat\n")
    assert list_text(tmp_path / "list.csv", 1000).startswith("path")
    assert rows(read_list(tmp_path / "list.csv", labelled=True, max_bytes=1000)) == [("a.png", "cat", "all")]


def test_a_list_of_many_rows_is_columns() -> None:
    """No object stays for a row, and time grows with the rows."""
    count = 50_000
    listing = parsed("path,label,split\n" + "".join(f"img/{row}.png,{row % 7},train\n" for row in range(count)))
    assert len(listing.paths) == len(listing.labels) == count
    assert listing.labels.nbytes + listing.splits.nbytes + listing.lines.nbytes == 13 * count


def test_columns_by_their_names(tmp_path: Path) -> None:
    text = "file,species,class,Fold Of\na.jpg,ant,1,valid\nb.jpg,bee,2,train\n"
    listing = parsed(text, columns={"label": "species", "split": "fold of"})
    assert rows(listing) == [("a.jpg", "ant", "val"), ("b.jpg", "bee", "train")]
    assert "column not used: 'class'" in listing.notes
    assert rows(parsed(text, columns={"path": "species", "label": "File"}))[0] == ("ant", "a.jpg", "all")
    for columns, message in [
        ({"label": "spezies"}, "list.csv, data.columns label=spezies: no such column; its first line has 'file', 'species', 'class', 'Fold Of'"),
        ({"path": "species", "label": "x", "split": "y"}, "data.columns label=x,split=y: no such column"),
    ]:
        with pytest.raises(UserError, match=message):
            parsed(text, columns=columns)
    with pytest.raises(UserError, match=r"which column is the label\? its first line has 'datei', 'art'; name it too"):
        parsed("datei;art\na.jpg;ant\n", columns={"path": "datei"})
    with pytest.raises(UserError, match=r"data.columns label=species: no such column; its first line has 'a.jpg ant'"):
        parsed("a.jpg ant\n", columns={"label": "species"})
