"""Norms of the source that have no place in the target, folded into the convolutions before them.

torchvision's ResNets have a norm on the shortcut, the tutorials' have none: folded, the shortcut computes the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dtl.checkpoint.transfer.layers.links import links_by_dataflow, links_by_names, links_by_neighbours
from dtl.checkpoint.transfer.layers.target import Target
from dtl.checkpoint.transfer.layers.units import WEIGHTED, Unit
from dtl.checkpoint.transfer.match.matching import Match

_PARTS = ("weight", "bias", "running_mean", "running_var")


def fold_orphans(matches: Mapping[str, Match], source: Sequence[Unit], target: Target) -> dict[str, Match]:
    """New matches for weight and bias of each target convolution whose source has a norm behind it and which itself has none.

    Only plain copies are folded, and only where the target has a bias to take the norm's shift.
    """
    used = {name for match in matches.values() for name in _names(match)}
    layers = _layers_of_norms(source)
    normed = _normed_layers(target)
    receivers = {match.source: name for name, match in matches.items() if not match.transform}
    by_weight = {unit.roles["weight"][0]: unit for unit in target.units if unit.kind in WEIGHTED and "weight" in unit.roles}
    by_index = {unit.index: unit for unit in source}
    folded: dict[str, Match] = {}
    for norm in source:
        layer = by_index.get(layers.get(norm.index, -1))
        if layer is not None and layer.index > norm.index:
            continue  # registered before its layer: it may act before it too
        if norm.kind != "bn" or layer is None or used.intersection(norm.names) or not all(part in norm.roles for part in _PARTS):
            continue
        taker = by_weight.get(receivers.get(layer.roles["weight"][0], ""))
        if taker is None or taker.index in normed or "bias" not in taker.roles:
            continue
        keys = [layer.roles["weight"][0], *(norm.roles[part][0] for part in _PARTS)]
        if "bias" in layer.roles:
            keys.append(layer.roles["bias"][0])
        parts = tuple(str(key) for key in keys)
        evidence = matches[str(taker.roles["weight"][0])].evidence
        folded[str(taker.roles["weight"][0])] = Match(parts, "fold_norm_weight", evidence)
        folded[str(taker.roles["bias"][0])] = Match(parts, "fold_norm_bias", evidence)
    return folded


def _layers_of_norms(source: Sequence[Unit]) -> dict[int, int]:
    named = links_by_names(source)
    if named or not all(unit.flat for unit in source):
        return named
    links = links_by_neighbours(source)
    return {norm: other for norm, found in links.items() for side, other in found if side == "post"}


def _normed_layers(target: Target) -> Collection[int]:
    """Target layers that have a norm of their own behind them."""
    links = links_by_dataflow(target.units, target.dataflow) if target.dataflow else links_by_neighbours(target.units)
    return {other for found in links.values() for side, other in found if side == "post"}


def _names(match: Match) -> tuple[str, ...]:
    return match.source if isinstance(match.source, tuple) else (match.source,)
