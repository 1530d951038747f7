"""The one reader of lists, for packing, training and prediction: `path label` a line (or separated by a tab), or CSV with a header.

Every line is an image, blank, or refused by its number; every field is used, or its column is named as unused. The `csv` module reads the
cells. But it has no line for a quote that is never closed, and of a quote that another one closes further down it makes one cell: these are found here.
"""

from __future__ import annotations

import csv
import io
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import ALL, IMAGE_EXTENSIONS, UNLABELLED
from dtl.data.sources.splits import SPLIT_WORDS, split_named
from dtl.errors import UserError
from dtl.files import read_regular
from dtl.text import counted, from_csv_cell, nearest, some

PATH_COLUMNS = ("path", "filepath", "file_path", "filename", "file_name", "image", "image_path", "file")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
SPLIT_COLUMNS = ("split", "subset", "partition", "ml_use")
# Column -> the splits of its True and its False.
TRUTH_COLUMNS = {
    "is_valid": ("val", "train"), "is_val": ("val", "train"), "is_validation": ("val", "train"), "is_test": ("test", "train"), "is_train": ("train", "test"),
    "is_training": ("train", "test"),
}  # fmt: skip
_TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), 0) | dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), 1)
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SHOWN = 80  # characters of a line


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


@dataclass(frozen=True)
class Listing:
    """The rows of a list as columns: no object stays for a row. `labels` and `splits` number `label_names` and `split_names`."""

    paths: StringTable
    lines: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    label_names: tuple[str, ...]
    splits: npt.NDArray[np.uint8]
    split_names: tuple[str, ...]
    notes: tuple[str, ...]


def list_text(path: Path, max_bytes: int) -> str:
    """The text of a list. ValueError where it is not UTF-8 text, with what to do; UserError where it is no regular file, or too large."""
    data = read_regular(path, max_bytes=max_bytes)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and len(data) % 2 == 0:
        raise ValueError("it is not UTF-8 text, but UTF-16; save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    if data.startswith(b"PK\3\4"):
        raise ValueError("it is not UTF-8 text, but an Excel workbook or another archive; save it as CSV (UTF-8)")
    if b"\0" in data:
        raise ValueError("it is not UTF-8 text, but binary data; a list is text with a line for each entry")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"it is not UTF-8 text (line {line} has the byte 0x{data[error.start]:02x}); if a spreadsheet wrote it, convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from None


def read_list(path: Path, *, labelled: bool, max_bytes: int, columns: Mapping[str, str] | None = None) -> Listing:
    """Read a list file. UserError for the first line that is wrong, by its number. `columns`: see `parse_list`."""
    try:
        text = list_text(path, max_bytes)
    except ValueError as error:
        raise UserError(f"{path} is not a list: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_list(text, origin=str(path), folder=path.parent, labelled=labelled, columns=columns)


def parse_list(text: str, *, origin: str, folder: Path, labelled: bool, paths_only: bool = False, columns: Mapping[str, str] | None = None) -> Listing:
    """Rows of a list's text. Where labels are not needed, a line may be a path alone, and a header names no other column.

    `origin` begins each message; `folder`: where its paths begin. `paths_only`: nothing else is looked at, as for a prediction. `columns`: the
    names of those for path, label and split, where they are not the usual ones.
    """
    lines, labels, splits = array("q"), array("i"), array("B")
    label_codes: dict[str, int] = {}
    split_codes: dict[str, int] = {}
    table = _find_header(text, labelled=labelled, paths_only=paths_only, columns=columns or {})
    if table is None and columns:
        raise UserError(f"{origin}, {_without_columns(text, columns)}")
    if table is None:
        if origin.lower().endswith(".csv") and labelled:
            raise UserError(f"{origin}, {_no_header(text, folder)}")
        rows = _text_rows(text, origin, folder, labelled=labelled)
    else:
        rows = table.rows(text, origin)

    def paths() -> Iterator[str]:
        for row in rows:
            lines.append(row.line)
            labels.append(label_codes.setdefault(row.label, len(label_codes)))
            splits.append(split_codes.setdefault(row.split, len(split_codes)))
            yield row.path

    found = StringTable.build(paths())
    # Splits in their usual order, whatever row comes first.
    names = tuple(name for name in (ALL, *SPLIT_WORDS) if name in split_codes) or (ALL,)
    order = np.array([names.index(name) for name in split_codes] or [0], np.uint8)
    numbers = order[np.frombuffer(splits, np.uint8)] if splits else np.zeros(0, np.uint8)
    notes = [] if table is None else table.notes([f"{count:,} {name}" for name, count in zip(names, np.bincount(numbers, minlength=len(names)))])
    return Listing(
        paths=found,
        lines=np.frombuffer(lines, np.int64) if lines else np.zeros(0, np.int64),
        labels=np.frombuffer(labels, np.int32) if labels else np.zeros(0, np.int32),
        label_names=tuple(label_codes),
        splits=numbers,
        split_names=names,
        notes=tuple(notes),
    )


# ---- lines of a path and a label


def _text_rows(text: str, origin: str, folder: Path, *, labelled: bool) -> Iterator[_Row]:
    for line, raw in enumerate(io.StringIO(text, newline=""), start=1):
        row = raw.strip()
        if not row:
            continue
        if not labelled and (looks_like_image(row) or os.path.exists(folder / _unquoted(row))):
            yield _Row(line, _unquoted(row), UNLABELLED, ALL)
            continue
        # Between tabs both may have spaces; else the label is the last field, so that the path may.
        fields = [field.strip() for field in re.split("\t+", row)] if "\t" in row else row.rsplit(None, 1)
        if len(fields) > 2:
            shown = row[:_SHOWN].expandtabs(4)
            raise UserError(f"{origin}, line {line}: {len(fields)} fields between tabs: `{shown}`; a line is `path label`, or a header names the columns")
        if not labelled and (len(fields) < 2 or not looks_like_image(fields[0])):
            fields = [row, UNLABELLED]
        if len(fields) < 2:
            raise UserError(f"{origin}, line {line}: no label: `{row[:_SHOWN]}`; a line is `path label`{_is_it_csv(row)}")
        label = fields[1]
        if label[0] in "\"'" and (len(label) < 3 or label[-1] != label[0]):
            raise UserError(f"{origin}, line {line}: a quote opens in the label that is not closed: `{row[:_SHOWN]}`")
        yield _Row(line, _unquoted(fields[0]), label[1:-1] if label[0] in "\"'" else label, ALL)


def looks_like_image(text: str) -> bool:
    """Whether a name has an image's extension."""
    return os.path.splitext(_unquoted(text))[1].lower() in IMAGE_EXTENSIONS


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")


def _is_it_csv(row: str) -> str:
    found = next((name for delimiter, name in _DELIMITERS.items() if delimiter in row), None)
    return f"; if {found} separate the columns, begin with a header that names them (path{',' if found == 'commas' else ';'}label)" if found else ""


# ---- CSV


def _find_header(text: str, *, labelled: bool, paths_only: bool, columns: Mapping[str, str]) -> _Table | None:
    """The columns, where the first line that is not blank names one of paths and one of labels (or the former alone, where labels are not needed)."""
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    given = {role: _column_name(name) for role, name in columns.items()}
    path, label = (given.get(role) for role in ("path", "label"))
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            continue
        names = [_column_name(cell) for cell in cells]
        has_label = not set(names).isdisjoint((label,) if label else LABEL_COLUMNS)
        if not set(names).isdisjoint((path,) if path else PATH_COLUMNS) and (has_label or not labelled) and set(given.values()) <= set(names):
            return _Table(delimiter, names, labelled=labelled, paths_only=paths_only, given=given)
    return None


def _column_name(cell: str) -> str:
    return cell.strip().lower().replace(" ", "_")


def _without_columns(text: str, columns: Mapping[str, str]) -> str:
    """Which of the columns that were asked for the header lacks."""
    first = next((line.strip() for line in io.StringIO(text, newline="") if line.strip()), "")
    cells = [_unquoted(cell) for cell in first.split(max(_DELIMITERS, key=first.count))]
    known = {_column_name(cell) for cell in cells}
    missing = [f"{role}={name}" for role, name in columns.items() if _column_name(name) not in known]
    has = f"its first line has {some(cells, limit=10, quoted=True)}"
    if missing:
        return f"data.columns {','.join(missing)}: no such column; {has}"
    return f"data.columns: which column is the {'label' if 'path' in columns else 'path'}? {has}; name it too (path=COLUMN,label=COLUMN)"


def _no_header(text: str, folder: Path) -> str:
    lines = ((line, raw.strip()) for line, raw in enumerate(io.StringIO(text, newline=""), start=1))
    line, first = next(((line, raw) for line, raw in lines if raw), (1, ""))
    delimiter = max(_DELIMITERS, key=first.count)
    cells = [_unquoted(cell) for cell in first.split(delimiter)]
    wanted = f"line {line}: a CSV list begins with a header that names a path and a label column (path,label), got `{first[:_SHOWN]}`"
    if looks_like_image(cells[0]) or (cells[0] and os.path.isfile(folder / cells[0])):
        return f"{wanted}; put the line `{delimiter.join(['path', 'label'])}` before it"
    missing = [
        f"{what} (read are {', '.join(known)})"
        for what, known in (("paths", PATH_COLUMNS), ("labels", LABEL_COLUMNS))
        if not set(known) & set(map(str.lower, cells))
    ]
    return f"{wanted}; rename the column of {' and that of '.join(missing)}"


@dataclass
class _Table:
    """The columns of a CSV list, by their header; it reads the rows, and says what it did with each column."""

    delimiter: str
    names: list[str]
    labelled: bool
    paths_only: bool
    given: Mapping[str, str] = field(default_factory=dict)
    """path, label, split: the columns that were asked for."""
    _spelled_splits: dict[int, set[str]] = field(default_factory=dict)
    """Unused columns that have named nothing but splits so far, and what they named."""
    _suspects: list[tuple[int, int, str]] = field(default_factory=list)
    """Records of several lines that may be rows: first line, last line, and what would be the label."""
    _splits_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def named(role: str, usual: Sequence[str]) -> list[str]:
            return [name for name in ([self.given[role]] if role in self.given else usual) if name in self.names]

        self.path = self.names.index(named("path", PATH_COLUMNS)[0])
        labels = [] if self.paths_only else named("label", LABEL_COLUMNS)
        self.label = self.names.index(labels[0]) if labels else None
        self.splits = [] if self.paths_only else named("split", (*SPLIT_COLUMNS, *TRUTH_COLUMNS))
        self.split = self.names.index(self.splits[0]) if self.splits else None
        used = {self.path, self.label, self.split}
        self.unused = [at for at in range(len(self.names)) if at not in used]
        self._spelled_splits = {at: set() for at in self.unused}

    def rows(self, text: str, origin: str) -> Iterator[_Row]:
        """All rows below the header. UserError for the first line that is none."""
        records = _records(text, origin, self.delimiter)
        self._check_header(*next((first, last) for first, last, cells in records if _has_text(cells)), origin)
        width, labels = len(self.names), set[str]()
        for first, last, cells in records:
            if (len(cells) != width or not cells[self.path].strip()) and not _has_text(cells):
                continue
            if len(cells) != width:
                self._check_width(cells, first, origin)
            if last > first:
                self._check_lines(cells, first, last, origin)
            path = from_csv_cell(cells[self.path].strip())
            label = "" if self.label is None else from_csv_cell(cells[self.label].strip())
            if not path or (not label and self.labelled):
                raise UserError(f"{origin}, line {first}: no {'label' if path else 'path'}: `{self._shown(cells)}`")
            labels.add(label)
            if self._spelled_splits:
                self._note_splits(cells)
            yield _Row(first, path, label or UNLABELLED, ALL if self.split is None else self._split_of(cells[self.split].strip(), first, origin))
        for first, last, label in self._suspects:
            if label in labels:
                raise UserError(_swallowed(origin, first, last))

    def notes(self, counts: Sequence[str]) -> list[str]:
        """After the rows: what the columns were used for, and which were not."""
        notes = []
        if self.split is not None:
            notes.append(f"column '{self.names[self.split]}': {', '.join(counts)}")
        spelled = {at: ", ".join(sorted(found)) for at, found in self._spelled_splits.items() if len(found) > 1}
        for at, found in spelled.items():
            notes.append(f"column '{self.names[at]}' names splits ({found}), but all rows are used; rename it to split to keep them apart")
        unused = [self.names[at] or "(no name)" for at in self.unused if at not in spelled]
        if unused:
            notes.append(f"{'column' if len(unused) == 1 else 'columns'} not used: {some(unused, limit=10, quoted=True)}")
        return notes

    def _shown(self, cells: Sequence[str]) -> str:
        return self.delimiter.join(cells)[:_SHOWN].replace("\n", " ")

    def _check_width(self, cells: Sequence[str], line: int, origin: str) -> None:
        """Empty cells at the end are none: spreadsheets write them."""
        if len(cells) < len(self.names) or _has_text(cells[len(self.names) :]):
            quotes = "; put a cell that holds the separator in quotes" if len(cells) > len(self.names) else ""
            fields = f"{counted(len(cells), 'field')} where the header names {len(self.names)}"
            raise UserError(f"{origin}, line {line}: {fields}: `{self._shown(cells)}`{quotes}")

    def _check_header(self, line: int, last: int, origin: str) -> None:
        where = f"{origin}, line {line}"
        if last > line:
            raise UserError(f"{where}: a quote opens in the header that is only closed in line {last}; close it, or remove it")
        used = [self.names[at] for at in (self.path, self.label, self.split) if at is not None]
        twice = next((name for name in used if self.names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: the header names the column '{twice}' twice")
        if len(self.splits) > 1:
            raise UserError(f"{where}: the columns {some(self.splits, quoted=True)} both name the split of an image; remove or rename all but one")

    def _check_lines(self, cells: Sequence[str], first: int, last: int, origin: str) -> None:
        """A record of several lines: a text with line breaks in it, or rows between two quotes that do not belong together?"""
        for at, cell in enumerate(cells[: len(self.names)]):
            lines = cell.splitlines()[1:]
            if lines and at in (self.label, self.split):
                raise UserError(_swallowed(origin, first, last))
            for line in lines:
                inner = [part.strip().strip('"') for part in line.split(self.delimiter)]
                if len(inner) <= max(self.path, self.label or 0):
                    continue
                if looks_like_image(inner[self.path]):
                    raise UserError(_swallowed(origin, first, last))
                if self.label is not None and len(inner) == len(self.names):
                    self._suspects.append((first, last, inner[self.label]))

    def _split_of(self, value: str, line: int, origin: str) -> str:
        assert self.split is not None
        if value in self._splits_of:
            return self._splits_of[value]
        name = self.names[self.split]
        if name in TRUTH_COLUMNS:
            truth = _TRUTH.get(value.lower())
            if truth is None:
                raise UserError(f"{origin}, line {line}: '{value}' in column '{name}' is neither true nor false (True, False, 1, 0, yes, no)")
            split: str | None = TRUTH_COLUMNS[name][truth]
        else:
            split = split_named(value)
        if split is None:
            words = [word for several in SPLIT_WORDS.values() for word in several]
            hint = nearest(value.lower(), words) or f" ({some(words, limit=20)})"
            raise UserError(f"{origin}, line {line}: '{value}' in column '{name}' is not the name of a split{hint}")
        return self._splits_of.setdefault(value, split)

    def _note_splits(self, cells: Sequence[str]) -> None:
        """Which unused columns still name nothing but splits."""
        for at, found in list(self._spelled_splits.items()):
            split = split_named(cells[at].strip())
            if split is None:
                del self._spelled_splits[at]
            else:
                found.add(split)


def _has_text(cells: Sequence[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _records(text: str, origin: str, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, cells) of each record. UserError names the line where a quote opens that is not closed."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        taken.clear()
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            quote = _last_quote(taken, delimiter)
            if quote is None:
                raise UserError(f"{origin}, line {first}: not readable as CSV: {error}") from None
            opened, still_open = quote
            where = f"{origin}, line {first + opened}"
            shown = taken[opened].strip()[:_SHOWN]
            if still_open or first + opened < reader.line_num:
                raise UserError(f"{where}: a quote opens here that is not closed: `{shown}`") from None
            raise UserError(f'{where}: text follows the closing quote of a cell: `{shown}`; a quote inside of a cell is written twice ("")') from None
        if cells is None:
            return
        yield first, reader.line_num, cells


def _last_quote(lines: Sequence[str], delimiter: str) -> tuple[int, bool] | None:
    """Which of a record's lines has the quote that opens its last quoted cell, and whether that is still open at the end."""
    opened: int | None = None
    inside, begins = False, True
    for number, line in enumerate(lines):
        at = 0
        while at < len(line):
            letter = line[at]
            if inside and letter == '"':
                if line[at + 1 : at + 2] == '"':
                    at += 1
                else:
                    inside = False
            elif not inside and letter == '"' and begins:
                opened, inside = number, True
            begins = not inside and (letter == delimiter or (begins and letter == " "))
            at += 1
    return None if opened is None else (opened, inside)


def _swallowed(origin: str, first: int, last: int) -> str:
    return (
        f"{origin}, line {first}: a quote opens here that is only closed in line {last}, and between them are lines that look like rows; close it, or remove it"
    )
