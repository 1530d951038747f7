"""Separate query, key and value projections seen as one fused projection, where the other network has it fused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dtl.checkpoint.transfer.layers.layer import Key, Layer, Shape

_PART = {"q": 0, "query": 0, "k": 1, "key": 1, "v": 2, "value": 2}


def fuse_projections(layers: Sequence[Layer], other: Sequence[Layer]) -> list[Layer]:
    """`layers` with each q, k, v triple of one module as a single layer, if `other` holds layers of the fused shape.

    Only where names say which is q, k and v: the three have one shape, and their order of registration means nothing.
    """
    wanted = {layer.shape for layer in other if layer.kind == "linear" and layer.shape[0] == 3 * layer.shape[1]}
    present = {layer.shape for layer in layers if layer.kind == "linear"}
    fused: list[Layer] = []
    at = 0
    while at < len(layers):
        triple = list(layers[at : at + 3])
        if _is_triple(triple):
            width = triple[0].shape[0]
            if (3 * width, triple[0].shape[1]) in wanted - present:
                fused.append(_joined(triple))
                at += 3
                continue
        fused.append(layers[at])
        at += 1
    if len(fused) == len(layers):
        return list(layers)
    return [Layer(u.path, u.kind, u.roles, index, u.flat) for index, u in enumerate(fused)]


def part_of(path: str) -> int | None:
    """0, 1, 2 for a path whose last word says query, key or value."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", path.rpartition(".")[2])]
    found = {_PART[word] for word in words if word in _PART}
    return found.pop() if len(found) == 1 else None


def _is_triple(layers: list[Layer]) -> bool:
    if len(layers) < 3 or any(layer.kind != "linear" or layer.shape != layers[0].shape for layer in layers):
        return False
    if len({layer.path.rpartition(".")[0] for layer in layers}) > 1 or layers[0].shape[0] != layers[0].shape[1]:
        return False
    parts = [part_of(layer.path) for layer in layers]
    return None not in parts and sorted(part for part in parts if part is not None) == [0, 1, 2]


def _joined(triple: list[Layer]) -> Layer:
    ordered = sorted(triple, key=lambda layer: part_of(layer.path) or 0)
    roles: dict[str, tuple[Key, Shape]] = {}
    for role in ("weight", "bias"):
        if all(role in layer.roles for layer in ordered):
            keys = tuple(name for layer in ordered for name in layer.roles[role][0])
            shape = ordered[0].roles[role][1]
            roles[role] = (keys, (3 * shape[0], *shape[1:]))
    return Layer(triple[0].path.rpartition(".")[0] + ".qkv", "linear", roles)
