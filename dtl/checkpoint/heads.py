"""Which layers are the classifier: its number of outputs belongs to a task, so it is set aside when weights move."""

from __future__ import annotations

from collections.abc import Sequence

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
