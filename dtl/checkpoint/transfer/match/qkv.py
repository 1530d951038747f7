"""Separate query, key and value projections seen as one fused projection, where the other network has it fused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dtl.checkpoint.transfer.layers.units import Key, Shape, Unit

_PART = {"q": 0, "query": 0, "k": 1, "key": 1, "v": 2, "value": 2}


def fuse_projections(units: Sequence[Unit], other: Sequence[Unit]) -> list[Unit]:
    """`units` with each q, k, v triple of one module as a single layer, if `other` holds layers of the fused shape.

    Only where names say which is q, k and v: the three have one shape, and their order of registration means nothing.
    """
    wanted = {unit.shape for unit in other if unit.kind == "linear" and unit.shape[0] == 3 * unit.shape[1]}
    present = {unit.shape for unit in units if unit.kind == "linear"}
    fused: list[Unit] = []
    at = 0
    while at < len(units):
        triple = list(units[at : at + 3])
        if _is_triple(triple):
            width = triple[0].shape[0]
            if (3 * width, triple[0].shape[1]) in wanted - present:
                fused.append(_joined(triple))
                at += 3
                continue
        fused.append(units[at])
        at += 1
    if len(fused) == len(units):
        return list(units)
    return [Unit(u.path, u.kind, u.roles, index, u.flat) for index, u in enumerate(fused)]


def part_of(path: str) -> int | None:
    """0, 1, 2 for a path whose last word says query, key or value."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", path.rpartition(".")[2])]
    found = {_PART[word] for word in words if word in _PART}
    return found.pop() if len(found) == 1 else None


def _is_triple(units: list[Unit]) -> bool:
    if len(units) < 3 or any(unit.kind != "linear" or unit.shape != units[0].shape for unit in units):
        return False
    if len({unit.path.rpartition(".")[0] for unit in units}) > 1 or units[0].shape[0] != units[0].shape[1]:
        return False
    parts = [part_of(unit.path) for unit in units]
    return None not in parts and sorted(part for part in parts if part is not None) == [0, 1, 2]


def _joined(triple: list[Unit]) -> Unit:
    ordered = sorted(triple, key=lambda unit: part_of(unit.path) or 0)
    roles: dict[str, tuple[Key, Shape]] = {}
    for role in ("weight", "bias"):
        if all(role in unit.roles for unit in ordered):
            keys = tuple(name for unit in ordered for name in _single(unit.roles[role][0]))
            shape = ordered[0].roles[role][1]
            roles[role] = (keys, (3 * shape[0], *shape[1:]))
    return Unit(triple[0].path.rpartition(".")[0] + ".qkv", "linear", roles)


def _single(key: Key) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
