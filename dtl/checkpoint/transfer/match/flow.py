"""Pairs from the dataflow of both networks: what feeds a layer, and what it feeds, must correspond too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dtl.checkpoint.transfer.layers.links import producers
from dtl.checkpoint.transfer.layers.trace import Dataflow
from dtl.checkpoint.transfer.layers.units import Unit
from dtl.checkpoint.transfer.match.views import Candidates

Neighbours = tuple[Mapping[int, set[int]], Mapping[int, set[int]]]
"""(units that feed a unit, units that it feeds)."""

_NONE: frozenset[int] = frozenset()


def prune_by_dataflow(candidates: Candidates, certain: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    """Drop candidates whose neighbours contradict certain pairs; whether any was dropped. Never the last one."""
    changed = False
    for j, options in candidates.items():
        if j in certain:
            continue
        kept = [i for i in options if i is None or _no_neighbour_missing(i, j, certain, ours, theirs)]
        if len(kept) < len(options) and any(i is not None for i in kept):
            candidates[j] = kept
            changed = True
    return changed


def _no_neighbour_missing(i: int, j: int, certain: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    return all(
        {certain[other] for other in their_side.get(j, _NONE) if other in certain} <= our_side.get(i, set()) for our_side, their_side in zip(ours, theirs)
    )


def complete_by_dataflow(
    source: Sequence[Unit],
    target: Sequence[Unit],
    certain: Mapping[int, int],
    source_flow: Dataflow,
    target_flow: Dataflow,
) -> dict[int, int]:
    """New pairs: layers of one shape that have certain neighbours on all the same sides, and no rival that has."""
    ours, theirs = producers(source, source_flow), producers(target, target_flow)
    known = dict(certain)
    new: dict[int, int] = {}
    while True:
        found = _pinned(source, target, known, ours, theirs)
        if not found:
            return new
        known.update(found)
        new.update(found)


def _pinned(source: Sequence[Unit], target: Sequence[Unit], known: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> dict[int, int]:
    used = set(known.values())
    back = {i: j for j, i in known.items()}
    options: dict[int, list[int]] = {}
    for unit in target:
        if unit.index in known or unit.kind == "buffer":
            continue
        fits = [
            other.index
            for other in source
            if other.index not in used and other.signature == unit.signature and _corresponds(other.index, unit.index, known, back, ours, theirs)
        ]
        if fits:
            options[unit.index] = fits
    wanted = Counter(i for fits in options.values() for i in fits)
    return {j: fits[0] for j, fits in options.items() if len(fits) == 1 and wanted[fits[0]] == 1}


def _corresponds(i: int, j: int, known: Mapping[int, int], back: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    """Whether all certain neighbours of each are neighbours of the other, with at least one."""
    support = 0
    for our_side, their_side in zip(ours, theirs):
        around_i, around_j = our_side.get(i, set()), their_side.get(j, set())
        wanted = {known[other] for other in around_j if other in known}
        returned = {back[other] for other in around_i if other in back}
        if not wanted <= around_i or not returned <= around_j:
            return False
        support += len(wanted)
    return support > 0
