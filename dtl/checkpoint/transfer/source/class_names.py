"""Class names of a head, from wherever people keep them, and which of its rows belongs to which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtl.checkpoint.transfer.layers.layer import Layer, detect_heads
from dtl.checkpoint.transfer.match.evidence import Match
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.sources.splits import choose, group_by_split, split_folders, split_named, sub_folders
from dtl.errors import UserError
from dtl.text import some
from dtl.untrusted import as_text, parse_json, parse_yaml, read_text

_IN_FOLDER = ("model.json", "model/model.json", MANIFEST_NAME)


@dataclass(frozen=True)
class HeadClasses:
    """What is known of the classes of both heads. `rows`: class of the target -> classes of the source whose rows become its row."""

    source: Sequence[str] | None = None
    target: Sequence[str] | None = None
    rows: Mapping[str, Sequence[str]] | None = None


def read_class_names(given: str | Path | Sequence[str], what: str) -> list[str]:
    """The names in the order of the head's outputs.

    `given`: the names themselves, also as `ants,bees`; a text file of one name a line; JSON or YAML with a list, with `classes`,
    or with numbers as keys (`id2label`); a run, a model folder, packed data, or a folder with one subfolder a class.
    `what` names the option in messages. UserError where there are none.
    """
    if isinstance(given, str) and not Path(given).exists() and "," in given:
        given = [name.strip() for name in given.split(",")]
    names = _from_path(Path(given), what) if isinstance(given, (str, Path)) else list(map(str, given))
    if not names:
        raise UserError(f"{what}: no class names in {given}")
    return names


def read_head_rows(given: str | Path | Mapping[str, Any], what: str) -> dict[str, tuple[str, ...]]:
    """class here -> classes of the source, from a mapping or a YAML or JSON file of one."""
    loaded = given if isinstance(given, Mapping) else _load(Path(given), what)
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{what}: expected lines of `class here: class of the source` (or a list of them), found {type(loaded).__name__}")
    return {str(name): tuple(map(str, old)) if isinstance(old, (list, tuple)) else (str(old),) for name, old in loaded.items()}


def _from_path(path: Path, what: str) -> list[str]:
    if path.is_dir():
        file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if file is None and (split := _split_folder(path)) is not None:
            return _from_path(split, what)
        if file is None:
            return sub_folders(path)
        path = file
    if path.suffix not in (".json", ".yaml", ".yml"):
        return [line.strip() for line in _text(path, what).splitlines() if line.strip()]
    loaded = _load(path, what)
    if isinstance(loaded, Mapping):
        loaded = loaded.get("classes", loaded.get("id2label", loaded))
    if isinstance(loaded, Mapping) and {str(key) for key in loaded} == set(map(str, range(len(loaded)))):
        by_number = {str(key): value for key, value in loaded.items()}
        loaded = [by_number[str(number)] for number in range(len(loaded))]
    if not isinstance(loaded, list) or not all(isinstance(name, (str, int)) for name in loaded):
        raise UserError(f"{what}: {path} has no class names: expected a list, `classes`, or names numbered from 0 (`id2label`)")
    return list(map(str, loaded))


def _split_folder(path: Path) -> Path | None:
    """The training split below a folder, or else another one: of packed data, or where all subfolders have the names of splits."""
    names = sub_folders(path)
    folders = split_folders(path, lambda folder: (folder / MANIFEST_NAME).is_file()) or (group_by_split(names) if all(map(split_named, names)) else {})
    name = choose(folders, "train", path) or choose(folders, "val", path)
    return None if name is None else path / name


def _text(path: Path, what: str) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"{what}: {path} is not readable as class names ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{what}: not readable as class names: {error}") from error


def _load(path: Path, what: str) -> Any:
    text = _text(path, what)
    try:
        return parse_json(text, str(path), by_hand=True) if path.suffix == ".json" else parse_yaml(text, str(path), prepare=as_text)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def pick_rows(
    source_classes: Sequence[str],
    target_classes: Sequence[str],
    head_rows: Mapping[str, str | Sequence[str]] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """For each target class the rows of the source's head: its own name's, or those of the classes that `head_rows` gives it.

    UserError on a class that the source does not have, or has twice (ImageNet has two called crane).
    """
    index = {name: row for row, name in enumerate(source_classes)}
    wanted = dict(head_rows or {})
    unknown = sorted(set(wanted) - set(target_classes))
    if unknown:
        raise UserError(f"head_rows: this network has no class '{unknown[0]}'; it has {', '.join(list(target_classes)[:6])} ...")
    picks = []
    missing = []
    for name in target_classes:
        given = wanted.get(name, name)
        names = (given,) if isinstance(given, str) else tuple(given)
        if not names:
            raise UserError(f"head_rows: the list of class '{name}' is empty")
        missing += [each for each in names if each not in index]
        twice = [each for each in names if list(source_classes).count(each) > 1]
        if twice:
            raise UserError(f"several classes of the source are named '{twice[0]}'; choose a row by its number in a map (transform: rows)")
        picks.append(tuple(index[each] for each in names if each in index))
    if missing:
        raise UserError(f"the source has no class {some(missing, limit=3, quoted=True)}")
    return tuple(picks)


def rows_of_head(
    layer: Layer,
    source: Sequence[Layer],
    classes: HeadClasses,
) -> tuple[dict[str, Match], tuple[tuple[int, ...], ...]] | str:
    """(matches, rows to pick) that fill the target's head `layer` by class names; text where that cannot be done."""
    theirs, ours = classes.source, classes.target
    if ours is None or theirs is None:
        return "the class names of both sides must be known to choose rows"
    if layer.shape[0] != len(ours):
        return f"it has {layer.shape[0]} outputs, but {len(ours)} class names were given for them"
    fitting = [u for u in detect_heads(source) if u.shape[0] == len(theirs) and u.shape[1:] == layer.shape[1:]]
    # An auxiliary head may have the shape of the main one: then their names decide.
    namesakes = [u for u in fitting if u.path.endswith(layer.path) or layer.path.endswith(u.path)]
    heads = namesakes if len(fitting) > 1 else fitting
    if len(heads) != 1:
        return f"the source has {'more than one' if fitting else 'no'} head of {len(theirs)} outputs and {list(layer.shape[1:])} inputs"
    try:
        picks = pick_rows(theirs, ours, classes.rows)
    except UserError as error:
        return str(error)
    shared = [(key[0], heads[0].roles[role][0]) for role, (key, _) in layer.roles.items() if role in heads[0].roles and len(key) == 1]
    return {name: Match(key, "rows", "class names") for name, key in shared}, picks
