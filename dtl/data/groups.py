"""Groups of images that belong together: a patient, a camera, a session. Images of one group are alike, so a group stands on one side of a split only."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtl.config.models import ColumnsConfig, GroupConfig
from dtl.data.shards.index import GROUPS_NAME, Shards
from dtl.data.shards.strings import StringTable
from dtl.data.sources.content_split import too_few_for_folds
from dtl.data.sources.list_file import PATH_COLUMNS, list_text
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, user_path
from dtl.text import counted, from_csv_cell, nearest, some

_GROUP_COLUMNS = ("group", "groups", "group_id")
_SHOWN = 3


@dataclass(frozen=True)
class Groups:
    """The group of each sample of a split: `codes` int64 [N] index `names`."""

    codes: npt.NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Changes with the groups of the samples."""
        digest = hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.codes, "<i8").data)
        return digest.hexdigest()


def find_groups(shards: Shards, given: GroupConfig, source: str, *, columns: ColumnsConfig | None = None) -> Groups:
    """The group of each sample of `shards`, which `source` names. UserError for a sample without one: it could stand on both sides.

    `columns`: those of the list that `source` is, if they are not the usual ones.
    """
    names = [shards.name(sample) for sample in range(shards.num_samples)]
    if given.regex is not None:
        found = _by_regex(names, given.regex, source)
    elif given.file is not None:
        found = _by_file(names, given.file, source)
    else:
        found = _by_column(shards, names, str(given.column), source, path_column=None if columns is None else columns.path)
    return numbered(found)


def numbered(found: list[str]) -> Groups:
    """From the name of each sample's group."""
    codes: dict[str, int] = {}
    numbers = np.fromiter((codes.setdefault(name, len(codes)) for name in found), np.int64, len(found))
    return Groups(numbers, tuple(codes))


def listed_groups(names: list[str], groups: Mapping[str, str], what: str) -> Groups:
    """The groups of images by their paths; UserError where one has none. `what` names the list."""
    return numbered(_looked_up(names, groups, what, "the list"))


def _by_regex(names: list[str], regex: str, source: str) -> list[str]:
    pattern = compiled(regex)
    found, without = list[str](), list[str]()
    for name in names:
        match = pattern.search(name)
        if match is None or match[1] is None:
            without.append(name)
        else:
            found.append(match[1])
    if without:
        what = "matches none" if not found else f"does not match {len(without):,}"
        raise UserError(
            f"data.group.regex {regex!r} {what} of the {counted(len(names), 'image')} of {source}, such as {some(without, limit=_SHOWN, quoted=True)}"
        )
    return found


def compiled(regex: str) -> re.Pattern[str]:
    """UserError where it is no regular expression, or has no group in parentheses."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"data.group.regex {regex!r} is not a regular expression: {error}") from None
    if not pattern.groups:
        raise UserError(f"data.group.regex {regex!r} has no part in parentheses, which would be the name of the group: '(patient[0-9]+)_'")
    return pattern


def _by_file(names: list[str], file: str, source: str) -> list[str]:
    return _looked_up(names, read_groups(file), f"data.group.file {file}", source)


def _looked_up(names: list[str], groups: Mapping[str, str], what: str, source: str) -> list[str]:
    """The group of each name. `groups`: path -> group. UserError where names have none."""
    without = [name for name in names if os.path.normpath(name) not in groups]
    if without:
        how_many = "none" if len(without) == len(names) else f"not {len(without):,}"
        raise UserError(
            f"{what} lists {how_many} of the {counted(len(names), 'image')} of {source}, "
            f"such as {some(without, limit=_SHOWN, quoted=True)}; its first path is '{next(iter(groups))}'"
        )
    return [groups[os.path.normpath(name)] for name in names]


def table_text(file: str, what: str) -> str:
    """Of a CSV file that is no list of images. UserError, with `what` it is, where it cannot be read."""
    try:
        return list_text(user_path(file), MAX_FILE_BYTES)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None


def table_rows(text: str, what: str, *, skipinitialspace: bool = False) -> tuple[str, list[tuple[int, list[str]]]]:
    """(the delimiter, by what the first line has most of; the number of its last line and the cells of each row)"""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=skipinitialspace)
    try:
        return delimiter, [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{what} is not readable as CSV: {error}") from None


def read_groups(file: str, column: str | None = None, *, path_column: str | None = None) -> dict[str, str]:
    """path -> group, of a CSV with these columns; `column`, `path_column`: their names, of a list of images."""
    what = f"data.group.file {file}" if column is None else f"the column of groups {column!r}: {file}"
    text = table_text(file, what)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter, lines = table_rows(text, what, skipinitialspace=True)
    rows = [row for _, row in lines]
    header = [cell.strip() for cell in rows[0]] if rows else []
    lower = [cell.lower().replace(" ", "_") for cell in header]
    usual = PATH_COLUMNS if path_column is None else (path_column.strip().lower().replace(" ", "_"),)
    path = next((lower.index(name) for name in usual if name in lower), None)
    if column is not None:
        if column not in header:
            raise UserError(f"{what} has no such column{nearest(column, header) or f'; it has {some(header, quoted=True)}'}")
        group: int | None = header.index(column)
    else:
        group = next((lower.index(name) for name in _GROUP_COLUMNS if name in lower), None)
    if path is None or group is None:
        raise UserError(f"{what}: its first line must name the columns path and group (path,group), got `{first[:80]}`")
    found: dict[str, str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(path, group) or not row[path].strip() or not row[group].strip():
            raise UserError(f"{what}, row {line}: no path or no group: `{delimiter.join(row)[:80]}`")
        name, one = os.path.normpath(from_csv_cell(row[path].strip())), row[group].strip()
        if found.setdefault(name, one) != one:
            raise UserError(f"{what}, row {line}: {name} is in two groups, '{found[name]}' and '{one}'")
    if not found:
        raise UserError(f"{what} lists no images")
    return found


def _by_column(shards: Shards, names: list[str], column: str, source: str, *, path_column: str | None) -> list[str]:
    """From the list that names the images, or from what packing stored of it."""
    stored = shards.group_column
    if stored == column:
        return [str(shards.group(sample)) for sample in range(shards.num_samples)]
    if stored is not None:
        raise UserError(f"data.group.column {column}: {source} was packed with the groups of column '{stored}'")
    if not os.path.isfile(user_path(source)):
        raise UserError(
            f"data.group.column {column}: {source} has no groups stored: pack the list with this column again (dtl pack LIST DST --group-column {column}), "
            "or give data.group.regex or data.group.file"
        )
    return _looked_up(names, read_groups(source, column, path_column=path_column), f"data.group.column {column}: the list", source)


def store_groups(folder: Path, groups: Mapping[str, str], column: str) -> None:
    """Write the groups of a packed split's samples beside its index, where `data.group.column` finds them. `groups`: path -> group."""
    shards = Shards.open(folder, whole=True)
    names = [shards.name(sample) for sample in range(shards.num_samples)]
    without = [name for name in names if os.path.normpath(name) not in groups]
    if without:
        raise UserError(f"--group-column {column}: the list has no group for {some(without, limit=_SHOWN, quoted=True)}")
    StringTable.build([*(groups[os.path.normpath(name)] for name in names), column]).write(folder / GROUPS_NAME)


def split_by_group(groups: Groups, labels: npt.NDArray[np.int32], fraction: float, *, num_classes: int, least: int = 0) -> npt.NDArray[np.bool_]:
    """True for the samples that are held out: whole groups, so that each class comes as close to its share as groups allow.

    `least`: so many samples are held out, even if the shares then are too large, where groups allow it. Groups are tried in the order of their
    names' hashes, which does not depend on the order of the samples; one is taken if that brings the counts of the classes closer to what is wanted,
    and leaves training an image of each class. UserError where no group can be held out.
    """
    if len(np.unique(groups.codes)) < 2:
        raise UserError(
            f"all {counted(len(labels), 'image')} are of one group, '{groups.names[int(groups.codes[0])]}', which cannot be on both sides of a split"
        )
    members = _members(groups, labels, num_classes)
    total = np.bincount(labels, minlength=num_classes)
    wanted, left = total * fraction, total.copy()
    taken: list[int] = []
    fallback: tuple[float, int] | None = None
    for group in sorted(members, key=lambda code: _hash(groups.names[code])):
        kinds, counts = members[group]
        if (left[kinds] <= counts).any():  # the last training images of a class
            continue
        have = total[kinds] - left[kinds]
        gain = float(np.abs(wanted[kinds] - have).sum() - np.abs(wanted[kinds] - have - counts).sum())
        if gain > 1e-9 or (gain > -1e-9 and (total - left).sum() < wanted.sum()):  # equally close: rather too many than too few
            left[kinds] -= counts
            taken.append(group)
        elif not taken and (fallback is None or gain > fallback[0] + 1e-9):
            fallback = (gain, group)
    if not taken:
        if fallback is None:
            raise UserError(f"none of the {counted(len(members), 'group')} can be held out: each has all images of a class; give --data.val FOLDER")
        taken = [fallback[1]]
        left[members[taken[0]][0]] -= members[taken[0]][1]
    while (total - left).sum() < least:
        more = [
            (float(np.abs(wanted[kinds] - total[kinds] + left[kinds] - counts).sum() - np.abs(wanted[kinds] - total[kinds] + left[kinds]).sum()), order, group)
            for order, group in enumerate(sorted(members, key=lambda code: _hash(groups.names[code])))
            for kinds, counts in [members[group]]
            if group not in taken and not (left[kinds] <= counts).any()
        ]
        if not more:
            break
        group = min(more)[2]
        left[members[group][0]] -= members[group][1]
        taken.append(group)
    return np.isin(groups.codes, taken)


def folds_by_group(groups: Groups, labels: npt.NDArray[np.int32], folds: int, *, seed: int, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The fold of each sample, from 0, so that a group is in one fold only, and each class is spread as evenly as groups allow.

    The largest groups come first (equal ones in an order that `seed` decides); each goes to the fold that has the smallest share of its classes so far, and
    of such folds to the smallest. UserError where there are too few groups, of all images or of a class.
    """
    members = _members(groups, labels, len(classes))
    if len(members) < folds:
        raise UserError(f"{folds} folds need as many groups of images, but there are only {len(members)}")
    owned = np.bincount(np.concatenate([kinds for kinds, _ in members.values()]), minlength=len(classes))
    for one in np.flatnonzero((owned > 0) & (owned < folds)).tolist():
        raise UserError(too_few_for_folds(folds, classes[one], counted(int(owned[one]), "group"), int(owned[one])))
    total, have = np.bincount(labels, minlength=len(classes)), np.zeros((folds, len(classes)))
    found = np.full(len(groups.names), -1, np.int64)
    for group in sorted(members, key=lambda code: (-int(members[code][1].sum()), _hash(f"{seed} {groups.names[code]}"))):
        kinds, counts = members[group]
        crowding = np.round((have[:, kinds] * (counts / total[kinds] ** 2)).sum(axis=1), 12)
        found[group] = np.lexsort((have.sum(axis=1), crowding))[0]
        have[found[group], kinds] += counts
    if (lonely := np.flatnonzero((have == total).any(axis=0) & (total > 0))).size:
        raise UserError(f"{folds} folds: all images of class '{classes[int(lonely[0])]}' would be in one of them; use fewer folds, or smaller groups")
    return found[groups.codes]


def _members(groups: Groups, labels: npt.NDArray[np.int32], num_classes: int) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Code of a group -> its classes, and how many images of each."""
    pairs, sizes = np.unique(groups.codes * num_classes + labels, return_counts=True)
    owners, classes = np.divmod(pairs, num_classes)
    first = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    last = np.append(first[1:], len(owners))
    return {int(owners[begin]): (classes[begin:end], sizes[begin:end]) for begin, end in zip(first, last)}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def refuse_broken(splits: Mapping[str, tuple[Shards, Groups]]) -> str | None:
    """The line about groups that are in several splits, with the first one by name; None where no group is torn."""
    sides: dict[str, str] = {}
    torn: dict[str, tuple[str, str]] = {}
    for split, (_, groups) in splits.items():
        for name in groups.names:
            if (other := sides.setdefault(name, split)) != split:
                torn.setdefault(name, (other, split))
    if not torn:
        return None
    name = min(torn)
    shown = " and ".join(f"{split} ({_example(*splits[split], name)})" for split in torn[name])
    return f"{counted(len(torn), 'group')} of images {'is' if len(torn) == 1 else 'are'} in more than one split: '{name}' is in {shown}"


def _example(shards: Shards, groups: Groups, name: str) -> str:
    return shards.name(int(np.argmax(groups.codes == groups.names.index(name))))
