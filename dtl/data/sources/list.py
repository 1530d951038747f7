"""List files: `path label` a line, or CSV with a header. Paths are relative to the list's folder; labels are names or numbers."""

from __future__ import annotations

import csv
import io
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import ALL, UNLABELLED, Source, SourceBuilder
from dtl.data.sources.display_names import find_display_names
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, read_regular
from dtl.text import from_csv_cell, nearest

PATH_COLUMNS = ("path", "filepath", "file_path", "filename", "file_name", "image", "image_path", "file")
_LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
_NUMBER = re.compile(r"[+-]?\d+")
_SHOWN_ERRORS = 3


def open_list(path: Path, *, classes: Sequence[str] | None, names: str | Path | None, labelled: bool = True, max_bytes: int = MAX_FILE_BYTES) -> Source:
    """Read a list. Names sort as text, numbers as numbers (class names "0", "1" ...). See `open_source`."""
    table, lines, coded, labels = _read_columns(path, labelled=labelled, max_bytes=max_bytes)
    if not lines:
        raise UserError(f"{path} lists no images; each line is `path label`, or CSV with a header path,label")
    numeric = all(_NUMBER.fullmatch(label) and len(label) < 4000 for label in labels)
    if numeric:
        labels = [str(int(label)) for label in labels]
    order = tuple(classes) if classes is not None else tuple(sorted(set(labels), key=int if numeric else None))
    if classes is None and len(order) == 1 and labelled:
        raise UserError(f"{path} has only one class, '{order[0]}'; a classifier needs two or more")
    number = {name: position for position, name in enumerate(order)}
    for code, label in enumerate(labels):
        if label not in number:
            line = lines[int(np.argmax(coded == code))]
            raise UserError(f"{path}, line {line}: class '{label}' is not in the given class list{nearest(label, order)}")
    sizes, mtimes = _check_files(path, table, lines)
    numbers = np.array([number[label] for label in labels], np.int32)[coded]
    notes: list[str] = []
    builder = SourceBuilder()
    builder.add_table(table, labels=numbers, split=0, sizes=sizes, mtimes=mtimes)
    without = [name for name, count in zip(order, np.bincount(numbers, minlength=len(order))) if not count]
    if without:
        notes.append(f"the list has no image of {len(without)} of {len(order)} classes: {', '.join(without[:5])}")
    display = find_display_names(order, given=names, beside=[path.parent], notes=notes)
    return builder.build(kind="list file", root=path.parent, classes=order, split_names=(ALL,), display_names=display, notes=notes)


def list_text(path: Path, max_bytes: int) -> str:
    """The text of a list. ValueError where it is not text; UserError where it is not a regular file, or too large."""
    text = read_regular(path, max_bytes=max_bytes).decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters")
    return text


def _read_columns(path: Path, *, labelled: bool, max_bytes: int) -> tuple[StringTable, array[int], npt.NDArray[np.int32], list[str]]:
    """Paths, line numbers, a code for each label, and the label of each code, in order of appearance; no object stays for a line."""
    lines, coded = array("q"), array("i")
    codes: dict[str, int] = {}

    def paths() -> Iterator[str]:
        for line, name, label in _rows(path, labelled=labelled, max_bytes=max_bytes):
            lines.append(line)
            coded.append(codes.setdefault(label, len(codes)))
            yield name

    table = StringTable.build(paths())
    return table, lines, np.frombuffer(coded, np.int32) if coded else np.zeros(0, np.int32), list(codes)


def _rows(path: Path, *, labelled: bool, max_bytes: int) -> Iterator[tuple[int, str, str]]:
    """(line number, path, label). Where labels are not needed, a line may be a path alone, and the header name no other column."""
    try:
        text = list_text(path, max_bytes)
    except ValueError:
        raise UserError(f"{path} is not a list: it is not UTF-8 text; a list has a line `path label` for each image") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    first = text.lstrip().partition("\n")[0]
    columns = _csv_columns(first, labelled=labelled)
    if columns is not None:
        yield from _csv_rows(path, text, *columns)
        return
    if path.suffix.lower() == ".csv":
        raise UserError(f"{path}, line 1: a CSV list begins with a header that names a path and a label column (path,label), got `{first[:80]}`")
    for line, row in enumerate(io.StringIO(text), start=1):
        if not row.strip():
            continue
        # The label is the last field, so a path may have spaces.
        fields = row.strip().rsplit(None, 1)
        if not labelled and (len(fields) < 2 or os.path.exists(path.parent / row.strip().strip("\"'"))):  # a name may be too long
            yield line, row.strip().strip("\"'"), UNLABELLED
            continue
        if len(fields) < 2:
            raise UserError(f"{path}, line {line}: no label: `{row.strip()[:80]}`; a line is `path label`")
        yield line, fields[0].strip("\"'"), fields[1]


def _csv_columns(first: str, *, labelled: bool) -> tuple[str, str, str | None] | None:
    """(delimiter, path column, label column) where the first line is a header that names both, or the first where labels are not needed."""
    for delimiter in (",", ";", "\t"):
        header = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
        paths = [name for name in PATH_COLUMNS if name in header]
        labels = [name for name in _LABEL_COLUMNS if name in header]
        if paths and (labels or not labelled):
            return delimiter, paths[0], labels[0] if labels else None
    return None


def _csv_rows(path: Path, text: str, delimiter: str, path_column: str, label_column: str | None) -> Iterator[tuple[int, str, str]]:
    reader = csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter, skipinitialspace=True)
    header = [cell.strip().lower() for cell in next(_checked_rows(reader, path))]
    columns = [header.index(name) for name in (path_column, label_column) if name is not None]
    for row in _checked_rows(reader, path):
        if not any(cell.strip() for cell in row):
            continue
        values = [from_csv_cell(row[at].strip()) if at < len(row) else "" for at in columns]
        for value, what in zip(values, ("path", "label")):
            if not value:
                raise UserError(f"{path}, line {reader.line_num}: no {what}: `{delimiter.join(row)[:80]}`")
        yield reader.line_num, values[0], values[1] if label_column is not None else UNLABELLED


def _checked_rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not readable as CSV: {error}") from None


def _check_files(path: Path, table: StringTable, lines: Sequence[int]) -> tuple[array[int], array[int]]:
    """Sizes and modification times; all lines whose file is missing are counted, the first ones named."""
    sizes, mtimes, missing, count = array("q"), array("q"), [], 0
    for position, line in enumerate(lines):
        name = table[position]
        try:
            status = (path.parent / name).stat()
        except OSError:
            count += 1
            if count <= _SHOWN_ERRORS:
                missing.append(f"line {line}: {name}")
            continue
        sizes.append(status.st_size)
        mtimes.append(status.st_mtime_ns)
    if count:
        more = f"; and {count - _SHOWN_ERRORS:,} more" if count > _SHOWN_ERRORS else ""
        raise UserError(f"{path}: {count:,} of {len(lines):,} images do not exist: {'; '.join(missing)}{more}; paths are relative to {path.parent}")
    return sizes, mtimes
