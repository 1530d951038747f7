"""List files as a source: which images there are, in which classes and splits. `list_file` reads them."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtl.data.sources.base import Source, SourceBuilder
from dtl.data.sources.display_names import find_display_names
from dtl.data.sources.list_file import Listing, read_list
from dtl.data.sources.near_paths import near_paths
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES
from dtl.text import counted, nearest, some

_NUMBER = re.compile(r"-?[0-9]{1,4000}")  # Python refuses to read longer ones
_SHOWN_ERRORS = 3
_MISSING_VALUES = ("nan", "null", "n/a", "#n/a", "<na>")


def open_list(
    path: Path,
    *,
    classes: Sequence[str] | None,
    names: str | Path | None,
    labelled: bool = True,
    max_bytes: int = MAX_FILE_BYTES,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Read a list. Labels are text, and are the names of the classes; where all are numbers they sort as numbers. See `open_source`."""
    rows = read_list(path, labelled=labelled, max_bytes=max_bytes, columns=columns)
    if not len(rows.lines):
        raise UserError(f"{path} lists no images; each line is `path label`, or CSV with a header path,label")
    numeric = all(map(_NUMBER.fullmatch, rows.label_names))
    order = tuple(classes) if classes is not None else tuple(sorted(rows.label_names, key=lambda name: (int(name) if numeric else 0, name)))
    if classes is None and len(order) == 1 and labelled:
        single = ", and more than its one image" if len(rows.lines) == 1 else ""
        raise UserError(f"{path} has only one class, '{order[0]}'; a classifier needs two or more{single}")
    number = {name: position for position, name in enumerate(order)}
    for code, label in enumerate(rows.label_names):
        if label not in number:
            line = rows.lines[int(np.argmax(rows.labels == code))]
            raise UserError(f"{path}, line {line}: class '{label}' is not in the given class list{_meant(label, order)}")
    sizes, mtimes = _check_files(path, rows)
    numbers = np.array([number[label] for label in rows.label_names], np.int32)[rows.labels]
    notes = [*rows.notes, *_doubtful_labels(rows), *_repeated(rows)]
    builder = SourceBuilder()
    builder.add_table(rows.paths, labels=numbers, split=rows.splits, sizes=sizes, mtimes=mtimes)
    without = [name for name, count in zip(order, np.bincount(numbers, minlength=len(order))) if not count]
    if without:
        notes.append(f"the list has no image of {len(without)} of {len(order)} classes: {', '.join(without[:5])}")
    display = find_display_names(order, given=names, beside=[path.parent], notes=notes)
    return builder.build(kind="list file", root=path.parent, classes=order, split_names=rows.split_names, display_names=display, notes=notes)


def _meant(label: str, classes: Sequence[str]) -> str:
    bare = label.lstrip("0")
    same = next((name for name in classes if name.lstrip("0") == bare and label.isdigit()), None)
    if same is not None:
        return f"; did you mean '{same}'? (spreadsheets take leading zeros away)"
    return nearest(label, classes) or f"; it has {some(classes, quoted=True)}"


def _check_files(path: Path, rows: Listing) -> tuple[array[int], array[int]]:
    """Sizes and modification times; all lines whose file is missing are counted, the first ones named, with what may have been meant."""
    sizes, mtimes, missing = array("q"), array("q"), array("q")
    for position in range(len(rows.lines)):
        try:
            status = os.stat(path.parent / rows.paths[position])
        except OSError:
            missing.append(position)
            continue
        sizes.append(status.st_size)
        mtimes.append(status.st_mtime_ns)
    if missing:
        shown = "; ".join(f"line {rows.lines[position]}: {rows.paths[position]}" for position in missing[:_SHOWN_ERRORS])
        more = f"; and {len(missing) - _SHOWN_ERRORS:,} more" if len(missing) > _SHOWN_ERRORS else ""
        header = missing[0] == 0 and len(missing) == 1 < len(rows.lines)
        hint = (
            "; name the columns path and label if it is a header"
            if header
            else near_paths([(rows.paths[position], rows.label_names[rows.labels[position]]) for position in missing[:1000]], path.parent)
        )
        raise UserError(
            f"{path}: {len(missing):,} of {len(rows.lines):,} images do not exist: {shown}{more}; paths are relative to {path.parent.absolute()}{hint}"
        )
    return sizes, mtimes


def _doubtful_labels(rows: Listing) -> list[str]:
    """Labels that are different classes, but hardly meant to be: in another case, with zeros before them, or no label at all."""
    notes = []
    for what, fold in (("upper and lower case", str.casefold), ("leading zeros", _without_zeros)):
        same: dict[str, list[str]] = {}
        for name in rows.label_names:
            same.setdefault(fold(name), []).append(name)
        twice = [several for several in same.values() if len(several) > 1]
        if twice:
            notes.append(f"{counted(len(twice), 'label')} in two spellings, which are two classes, by {what}: {some(twice[0], quoted=True)}")
    none = [name for name in rows.label_names if name.lower() in _MISSING_VALUES]
    if none:
        count = int(np.isin(rows.labels, [rows.label_names.index(name) for name in none]).sum())
        notes.append(f"{counted(count, 'row')} with the label {some(none, quoted=True)}, which is a class here; remove them if it means that there is no label")
    return notes


def _without_zeros(label: str) -> str:
    return label.lstrip("0") if label.isdigit() else label


def _repeated(rows: Listing) -> list[str]:
    """Lines about images that are listed more than once: each row counts, so they are trained on as often."""
    first, again = _same_paths(rows)
    if not len(again):
        return []
    example = f"line {rows.lines[again[0]]} names the image of line {rows.lines[first[0]]}"
    notes = [f"{counted(len(again), 'row')} with an image that an earlier row has; each row counts ({example})"]
    for codes, names, what in ((rows.labels, rows.label_names, "label"), (rows.splits, rows.split_names, "split")):
        other = np.flatnonzero(codes[first] != codes[again])
        if len(other):
            a, b = int(first[other[0]]), int(again[other[0]])
            notes.append(
                f"{counted(len(other), 'row')} with another {what} than an earlier row of the same image: {rows.paths[b]} is "
                f"'{names[codes[a]]}' in line {rows.lines[a]} and '{names[codes[b]]}' in line {rows.lines[b]}"
            )
    return notes


def _same_paths(rows: Listing) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(first, again): positions of rows whose path an earlier row has, and of that one. By hashes, so that no object stays for a path."""
    hashes = np.fromiter((hash(os.path.normpath(rows.paths[row])) for row in range(len(rows.lines))), np.int64, len(rows.lines))
    order = np.argsort(hashes, kind="stable")
    begins = np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]])
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    again = np.sort(order[~begins])
    first_of = np.empty(len(order), np.int64)
    first_of[order] = first
    return first_of[again], again
