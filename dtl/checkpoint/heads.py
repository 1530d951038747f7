"""Which layers are the classifier: its number of outputs belongs to a task, so it is set aside when weights move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtl.checkpoint.units import WEIGHTED, Unit
from dtl.errors import UserError

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

    UserError on a class that the source does not have.
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
        picks.append(tuple(index[each] for each in names if each in index))
    if missing or not all(picks):
        raise UserError(f"the source has no class '{missing[0] if missing else ''}' ({len(missing)} such)")
    return tuple(picks)
