"""Which norm belongs to which convolution: a norm's weights are only right beside those of the layer it was trained with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from dtl.checkpoint.transfer.layers.trace import Dataflow
from dtl.checkpoint.transfer.layers.units import NORMS, WEIGHTED, Unit

Link = tuple[str, int]
"""("post", unit): the norm comes after that layer; ("pre", unit): before it."""


def owners(units: Sequence[Unit]) -> dict[str, int]:
    """Tensor name -> index of its unit."""
    return {name: unit.index for unit in units for name in unit.names}


def producers(units: Sequence[Unit], flow: Dataflow) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """(units that feed a unit, units that it feeds), by index."""
    own = owners(units)
    before: dict[int, set[int]] = defaultdict(set)
    after: dict[int, set[int]] = defaultdict(set)
    for name, upstream in flow.feeds.items():
        if name not in own:
            continue
        for other in upstream:
            if other in own and own[other] != own[name]:
                before[own[name]].add(own[other])
                after[own[other]].add(own[name])
    return before, after


def links_by_dataflow(units: Sequence[Unit], flow: Dataflow) -> dict[int, set[Link]]:
    """Norm -> layers that feed it (of as many channels) and layers that it feeds."""
    before, after = producers(units, flow)
    by_index = {unit.index: unit for unit in units}
    links = {}
    for unit in units:
        if unit.kind not in NORMS:
            continue
        found: set[Link] = {("post", other) for other in before[unit.index] if by_index[other].kind in WEIGHTED and by_index[other].shape[0] == unit.shape[0]}
        found |= {("pre", other) for other in after[unit.index] if by_index[other].kind in WEIGHTED}
        if found:
            links[unit.index] = found
    return links


def links_by_neighbours(units: Sequence[Unit]) -> dict[int, set[Link]]:
    """The same from registration order alone, only where layers and norms strictly alternate."""
    links: dict[int, set[Link]] = {}
    for at, unit in enumerate(units):
        if unit.kind not in NORMS:
            continue
        before = units[at - 1] if at else None
        after = units[at + 1] if at + 1 < len(units) else None
        if any(other is not None and other.kind in NORMS for other in (before, after)):
            continue
        found: set[Link] = set()
        if before is not None and before.kind in WEIGHTED and before.shape[0] == unit.shape[0]:
            earlier = units[at - 2] if at > 1 else None
            if earlier is not None and earlier.kind in WEIGHTED and earlier.shape[0] == unit.shape[0]:
                continue
            found.add(("post", before.index))
        if after is not None and after.kind in WEIGHTED and len(after.shape) > 1 and after.shape[1] == unit.shape[0]:
            found.add(("pre", after.index))
        if found:
            links[unit.index] = found
    return links


_NUMBER = re.compile(r"(\d+)$")


def links_by_names(units: Sequence[Unit]) -> dict[int, int]:
    """Norm -> its layer, from names alone: `conv1` and `bn1`, Sequential `0` and `1`, or, where no number says anything, the only
    layer of a module with as many outputs (`conv_stem` and `bn1`), if no other norm there has that size."""
    inside: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.kind in (*WEIGHTED, *NORMS) and not unit.flat:
            inside[unit.path.rpartition(".")[0]].append(unit)
    links = {}
    for siblings in inside.values():
        layers = [unit for unit in siblings if unit.kind in WEIGHTED]
        norms = [unit for unit in siblings if unit.kind in NORMS]
        for norm in norms:
            mates = [layer for layer in layers if _numbers_agree(layer, norm)]
            if not mates and sum(other.shape == norm.shape for other in norms) == 1:
                mates = [layer for layer in layers if layer.shape[0] == norm.shape[0]]
            if len(mates) == 1 and mates[0].shape[0] == norm.shape[0]:
                links[norm.index] = mates[0].index
    return links


def _numbers_agree(layer: Unit, norm: Unit) -> bool:
    ours, theirs = (unit.path.rpartition(".")[2] for unit in (layer, norm))
    a, b = _NUMBER.search(ours), _NUMBER.search(theirs)
    if a is None or b is None:
        return False
    if ours.isdigit() and theirs.isdigit():
        return int(ours) + 1 == int(theirs)
    return a.group(1) == b.group(1) and not ours.isdigit() and not theirs.isdigit()
