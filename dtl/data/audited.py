"""`data.audit`: what the user decided about single images in the CSV file of `dtl audit`, honoured when the images are opened.

Only the column `action` counts: `drop`, `relabel:CLASS`, `group` (with the image in `other`), `keep` or nothing. What is left becomes a part of the packed
images (see `dtl.data.shards.part`) with a dataset id of its own, in the cache; the images, their labels and the shards stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.groups import Groups, numbered, table_rows, table_text
from dtl.data.shards.index import Shards, write_part
from dtl.data.shards.part import PART_NAME
from dtl.errors import UserError
from dtl.files import write_whole
from dtl.text import counted, from_csv_cell, nearest, some
from dtl.untrusted import as_utf8, json_lines

COLUMNS = ("path", "kind", "score", "other", "suggestion", "action")
AUDITED_NAME = "audited.jsonl"
"""Beside part.json, and in a run folder: one line for each image that was dropped, relabelled or grouped."""
_VERSION = 1  # of how actions are honoured
_SHOWN = 3
_RELABEL = "relabel:"


@dataclass(frozen=True)
class Row:
    """One row with an action. `line` is its number in the file."""

    line: int
    path: str
    other: str
    action: str


@dataclass
class Actions:
    """The rows of an audit's file that say what to do, and which of them were found."""

    file: str
    digest: str
    rows: tuple[Row, ...]
    paths: frozenset[str]
    """All that the file names."""
    found: dict[str, set[str]] = field(default_factory=dict)
    """Its paths that were found, each with the splits that have it."""

    def check(self, source: str) -> None:
        """UserError where a path with an action is in no split, so that its action would be ignored in silence, or in several of them."""
        if self.paths and not self.found:
            raise UserError(f"data.audit {self.file}: not one of its {counted(len(self.paths), 'path')} is in {source}: it is the audit of another data set")
        named = dict.fromkeys(path for row in self.rows for path in (row.path, *([row.other] if row.action == "group" else [])))
        missing = [path for path in named if path not in self.found]
        if missing:
            raise UserError(
                f"data.audit {self.file} has an action for {counted(len(missing), 'image')} that {source} does not have, such as "
                f"{some(missing, limit=_SHOWN, quoted=True)}: run dtl audit again, or take these rows out"
            )
        for path in named:
            if len(splits := sorted(self.found[path])) > 1:
                raise UserError(f"data.audit {self.file}: {' and '.join(splits)} have an image '{path}' each: write {splits[0]}:{path} or {splits[1]}:{path}")

    def groups(self) -> dict[str, str]:
        """Path -> name of its group, of all images that `group` joins: the first of its paths."""
        above: dict[str, str] = {}
        for row in self.rows:
            if row.action == "group":
                one, other = _root(above, row.path), _root(above, row.other)
                above[max(one, other)] = min(one, other)
        return {path: _root(above, path) for path in list(above)}


def _root(above: dict[str, str], name: str) -> str:
    """Of a forest: name -> the one above it, itself for a root."""
    while (up := above.setdefault(name, name)) != name:
        name = up
    return name


def read_actions(file: str) -> Actions:
    """UserError for a file that is none, an unknown action, or two different actions for one image."""
    what = f"data.audit {file}"
    text = table_text(file, what)
    records = [(line, cells) for line, cells in table_rows(text, what)[1] if any(cell.strip() for cell in cells)]
    header = [cell.strip() for cell in records[0][1]] if records else []
    if lacking := [name for name in ("path", "other", "action") if name not in header]:
        raise UserError(f"{what} has no column {some(lacking, quoted=True)}: its first line must be {','.join(COLUMNS)}, as dtl audit writes it")
    at = {name: header.index(name) for name in ("path", "other", "action")}
    rows, paths, decided = list[Row](), set[str](), dict[str, Row]()
    for line, cells in records[1:]:
        if len(cells) <= max(at.values()):
            raise UserError(f"{what}, line {line}: {counted(len(cells), 'cell')} where {len(header)} are expected")
        path, other, action = (from_csv_cell(cells[at[name]]).strip() for name in ("path", "other", "action"))
        if not path:
            raise UserError(f"{what}, line {line}: no path")
        paths.add(path)
        row = Row(line, path, other, _known(action, what, line))
        if row.action == "group" and not other:
            raise UserError(f"{what}, line {line}: the action group needs another image in the column other")
        if row.action in ("", "keep"):
            continue
        rows.append(row)
        if row.action != "group" and (before := decided.setdefault(path, row)).action != row.action:
            raise UserError(f"{what}: line {before.line} says {before.action} for {path}, and line {line} says {row.action}; keep one of them")
    return Actions(file, hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), tuple(rows), frozenset(paths))


def _known(action: str, what: str, line: int) -> str:
    if action.startswith(_RELABEL):
        if not (name := action[len(_RELABEL) :].strip()):
            raise UserError(f"{what}, line {line}: relabel: needs a class (relabel:CLASS)")
        return _RELABEL + name
    if action not in ("", "keep", "drop", "group"):
        near = nearest(action, ("drop", "group", "keep"))
        raise UserError(f"{what}, line {line}: unknown action '{action}'; it is drop, relabel:CLASS, group, keep or empty{near}")
    return action


def names_in(shards: Mapping[str, Shards]) -> dict[str, list[str]]:
    """By split: what each image is called in an audit. A path that several splits have gets its split before it: `val:ants/1.jpg`."""
    plain = {split: [one.name(sample) for sample in range(one.num_samples)] for split, one in shards.items()}
    seen: dict[str, int] = {}
    for names in plain.values():
        for name in set(names):
            seen[name] = seen.get(name, 0) + 1
    return {split: [f"{split}:{name}" if seen[name] > 1 else name for name in names] for split, names in plain.items()}


def honour(shards: Shards, split: str, actions: Actions, home: Path) -> bool:
    """Write what `actions` leave of a split into the folder `home`, as a part; False where they change nothing of it."""
    wanted = {row.path: row for row in actions.rows if row.action != "group"}
    grouped = actions.groups()
    chosen, labels = np.ones(shards.num_samples, bool), np.array(shards.labels)
    entries: list[dict[str, Any]] = []
    for sample in range(shards.num_samples):
        name = shards.name(sample)
        for called in (name, f"{split}:{name}"):
            if called not in actions.paths and called not in grouped:
                continue
            actions.found.setdefault(called, set()).add(split)
            entries += _apply(shards, split, sample, called, wanted.get(called), grouped.get(called), actions, chosen, labels)
    if not entries:
        return False
    if not chosen.any():
        raise UserError(f"data.audit {actions.file} drops all {counted(shards.num_samples, 'image')} of {split}")
    if not (home / PART_NAME).is_file():
        home.mkdir(parents=True, exist_ok=True)
        write_whole(home / AUDITED_NAME, lambda file: file.writelines((json.dumps(entry) + "\n").encode() for entry in entries))
        write_part(shards, chosen, home, labels=labels)
    return True


def place_of(home: Path, shards: Shards, split: str, actions: Actions) -> Path:
    """Where below `home` the part lies that `honour` makes of these images."""
    facts = [_VERSION, split, str(shards.place.absolute()), shards.dataset_id, actions.digest]
    return home / f"audited-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]}" / split


def ledger(shards: Shards) -> list[dict[str, Any]]:
    """What was done to a split that `honour` or `hand_on` wrote; nothing for any other."""
    path = shards.place / AUDITED_NAME
    return [] if shards.part is None or not path.is_file() else list(json_lines(path))


def write_ledger(splits: Mapping[str, Shards], path: Path) -> None:
    """The ledgers of all splits of a run in one file; none where nothing was done."""
    path.unlink(missing_ok=True)
    if entries := [entry for shards in splits.values() for entry in ledger(shards)]:
        write_whole(path, lambda file: file.writelines((json.dumps(entry) + "\n").encode() for entry in entries))


def hand_on(train: Shards, place: Path) -> None:
    """The ledger goes with the part of the training images that is trained on, where others are held out."""
    if entries := ledger(train):
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / AUDITED_NAME, lambda file: file.writelines((json.dumps(entry) + "\n").encode() for entry in entries))


def described(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line about the images of a ledger, by action and split."""
    found: dict[tuple[str, str], int] = {}
    for entry in entries:
        kind = {"drop": "dropped", "relabel": "relabelled", "group": "grouped"}[entry["action"]]
        found[kind, entry["split"]] = found.get((kind, entry["split"]), 0) + 1
    kinds = {kind: [f"{split} {count:,}" for (one, split), count in found.items() if one == kind] for kind in ("dropped", "relabelled", "grouped")}
    return "; ".join(f"{sum(count for (one, _), count in found.items() if one == kind):,} {kind} ({', '.join(of)})" for kind, of in kinds.items() if of)


def joined(groups: Groups | None, names: Sequence[str], split: str, actions: Actions) -> Groups | None:
    """Groups of images with those together that the action `group` joins; `names` are the images' own. None where there are no groups at all."""
    pairs = actions.groups()
    if not pairs:
        return groups
    of = {path.removeprefix(f"{split}:"): group for path, group in pairs.items() if not _elsewhere(path, split, actions)}
    own = [f"image {name}" for name in names] if groups is None else [groups.names[code] for code in groups.codes]
    above: dict[str, str] = {}
    for name, group in zip(names, own):
        if name in of:
            above[_root(above, group)] = _root(above, f"audit: {of[name]}")
    return numbered([_root(above, group) for group in own])


def _elsewhere(path: str, split: str, actions: Actions) -> bool:
    """Whether the path is an image of other splits only."""
    return split not in actions.found.get(path, {split})


def _apply(
    shards: Shards,
    split: str,
    sample: int,
    called: str,
    row: Row | None,
    group: str | None,
    actions: Actions,
    chosen: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int32],
) -> list[dict[str, Any]]:
    """Honour the actions for one image; returns their lines of the ledger."""
    entry = {"split": split, "sample": sample, "path": as_utf8(called), "label": as_utf8(shards.classes[labels[sample]])}
    entries = [] if group is None else [{**entry, "action": "group", "group": as_utf8(group)}]
    if row is not None and row.action == "drop":
        chosen[sample] = False
        return [*entries, {**entry, "action": "drop"}]
    if row is not None:
        name = row.action[len(_RELABEL) :]
        if name not in shards.classes:
            raise UserError(f"data.audit {actions.file}, line {row.line}: there is no class '{name}' to relabel {called} to{nearest(name, shards.classes)}")
        labels[sample] = shards.classes.index(name)
        return [*entries, {**entry, "action": "relabel", "to": as_utf8(name)}]
    return entries
