"""Which layers are the classifier: its number of outputs belongs to a task, so it is set aside when weights move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from dtl.checkpoint.transfer.layers.units import WEIGHTED, Unit
from dtl.checkpoint.transfer.match.matching import Match
from dtl.errors import UserError

Classes = tuple[Sequence[str] | None, Sequence[str] | None]
"""Class names of the source's head and of the target's, as far as they are known."""

_HEAD_WORDS = ("head", "heads", "fc", "classifier", "linear", "last_linear", "logits", "output", "out", "cls")


def head_units(units: Sequence[Unit], heads: Sequence[str] | None) -> list[Unit]:
    """The head's layers: those inside the modules named in `heads`, else found. UserError on a name that holds no layer."""
    if heads is None:
        return detect_heads(units)
    found = []
    for head in heads:
        inside = [unit for unit in units if unit.path == head or unit.path.startswith(head + ".")]
        if not inside:
            raise UserError(f"heads: the network has no layer called {head}")
        found += inside
    return found


def detect_heads(units: Sequence[Unit]) -> list[Unit]:
    """The last linear layer (or last convolution that is called a classifier), and auxiliary heads of as many outputs.

    The last of those whose module says so at the top (`fc`, `head.fc`), wherever it is registered; else the last of all.
    """
    weighted = [unit for unit in units if unit.kind in WEIGHTED]
    if len(weighted) < 2:
        return []
    called = [unit for unit in weighted if unit.kind == "linear" and _called_head(unit.path.split(".")[0]) and not _auxiliary(unit.path)]
    last = called[-1] if called and weighted[-1].kind == "linear" and not _called_head(weighted[-1].path) else weighted[-1]
    if last.kind == "conv" and not _called_head(last.path):
        return []
    if last.kind == "linear" and len(last.shape) != 2:
        return []
    outputs = last.shape[0]
    return [unit for unit in weighted if unit is last or (unit.shape[0] == outputs and _auxiliary(unit.path) and _called_head(unit.path))]


def _called_head(path: str) -> bool:
    return any(word.rstrip("0123456789") in _HEAD_WORDS for word in path.lower().split("."))


def _auxiliary(path: str) -> bool:
    return "aux" in path.lower() or path.lower().startswith("head")


def num_source_classes(units: Sequence[Unit], otherwise: int) -> int:
    """Outputs of the head that is found among these layers; `otherwise` where there is none."""
    heads = detect_heads(units)
    return heads[0].shape[0] if heads else otherwise


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
        missing += [each for each in names if each not in index]
        twice = [each for each in names if list(source_classes).count(each) > 1]
        if twice:
            raise UserError(f"the source calls several of its classes '{twice[0]}'; choose by number in a map (transform: rows)")
        picks.append(tuple(index[each] for each in names if each in index))
    if missing or not all(picks):
        raise UserError(f"the source has no class '{missing[0] if missing else ''}' ({len(missing)} such)")
    return tuple(picks)


def head_obstacle(
    unit: Unit,
    matches: Mapping[str, Match],
    source: Sequence[Unit],
    classes: Classes,
    keep_head: bool | Literal["rows"] | None,
) -> str:
    """Why the target's head `unit` is not loaded as it was matched; "" where it is."""
    if keep_head is False:
        return "left fresh as asked (keep_head: false)"
    found = [matches.get(name) for name in unit.names]
    heads = detect_heads(source)
    other = f"{unit.shape[0]} outputs here, {heads[0].shape[0] if heads else 'none'} in the source"
    if not all(found):
        if not heads:
            return "the source has none"
        return "no part of the source belongs here" if heads[0].shape[0] == unit.shape[0] else other
    if all(match is not None and match.transform == "rows" for match in found):
        return ""  # a map that chooses rows has chosen
    if any(match is not None and match.transform not in ("", "squeeze", "reshape_kernel", "transpose_kernel") for match in found):
        return other
    theirs, ours = classes
    if keep_head is None and ours is not None and theirs is not None and list(ours) != list(theirs):
        return "the classes are others"
    return ""


def rows_of_head(
    unit: Unit,
    source: Sequence[Unit],
    classes: Classes,
    head_rows: Mapping[str, str | Sequence[str]] | None,
) -> tuple[dict[str, Match], tuple[tuple[int, ...], ...]] | str:
    """(matches, rows to pick) that fill the target's head `unit` by class names; text where that cannot be done."""
    theirs, ours = classes
    if ours is None or theirs is None:
        return "the class names of both sides must be known to choose rows"
    if unit.shape[0] != len(ours):
        return f"it has {unit.shape[0]} outputs, but {len(ours)} class names were given for them"
    fitting = [u for u in detect_heads(source) if u.shape[0] == len(theirs) and u.shape[1:] == unit.shape[1:]]
    # An auxiliary head may have the shape of the main one: then their names decide.
    namesakes = [u for u in fitting if u.path.endswith(unit.path) or unit.path.endswith(u.path)]
    heads = namesakes if len(fitting) > 1 else fitting
    if len(heads) != 1:
        return f"the source has {'more than one' if fitting else 'no'} head of {len(theirs)} outputs and {list(unit.shape[1:])} inputs"
    try:
        picks = pick_rows(theirs, ours, head_rows)
    except UserError as error:
        return str(error)
    shared = [(name, heads[0].roles[role][0]) for role, (name, _) in unit.roles.items() if role in heads[0].roles and isinstance(name, str)]
    return {name: Match(key, "rows", "class names") for name, key in shared}, picks
