"""Reasons to believe a pair that do not rest on the order of registration."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from dtl.checkpoint.transfer.layers.links import producers
from dtl.checkpoint.transfer.layers.names import likeness
from dtl.checkpoint.transfer.layers.trace import Dataflow
from dtl.checkpoint.transfer.layers.tree import loose_signature
from dtl.checkpoint.transfer.layers.units import Unit

LIKE = 0.75
"""Names at least this alike count as the same name..."""
CLEARLY = 0.08
"""...if no other layer of the shape comes this near, on either side."""


class NameEvidence:
    """Which source layer's name fits a target layer clearly best among all layers of its shape."""

    def __init__(self, source: Sequence[Unit], target: Sequence[Unit], *, distrusted: Collection[int]) -> None:
        self.source = {unit.index: unit for unit in source}
        self.target = {unit.index: unit for unit in target}
        self.ours, self.theirs = defaultdict(list), defaultdict(list)
        self.distrusted = frozenset(distrusted)
        for unit in source:
            self.ours[loose_signature(unit)].append(unit.index)
        for unit in target:
            self.theirs[loose_signature(unit)].append(unit.index)

    def like(self, i: int, j: int) -> float:
        if j in self.distrusted:
            return 0.0
        return likeness(self.source[i].path, self.target[j].path)

    def best(self, j: int) -> int | None:
        """The source layer of the same shape whose name fits `j` clearly best, both ways; None where there is none such."""
        signature = loose_signature(self.target[j])
        row = sorted(((self.like(i, j), i) for i in self.ours[signature]), key=lambda pair: (-pair[0], pair[1]))
        if not row or row[0][0] < LIKE or (len(row) > 1 and row[0][0] - row[1][0] < CLEARLY):
            return None
        top, i = row[0]
        if any(other != j and top - self.like(i, other) < CLEARLY for other in self.theirs[signature]):
            return None
        return i

    def better(self, i: int, j: int) -> list[int]:
        """Source layers of the same shape whose names fit `j` clearly better than `i`'s does."""
        bar = max(LIKE, self.like(i, j) + CLEARLY)
        return [a for a in self.ours[loose_signature(self.target[j])] if a != i and self.like(a, j) >= bar]


def unique_shapes(source: Sequence[Unit], target: Sequence[Unit]) -> dict[int, int]:
    """Target -> source, where both networks have exactly one layer of that shape."""
    ours = Counter(loose_signature(unit) for unit in source)
    theirs = Counter(loose_signature(unit) for unit in target)
    where = {loose_signature(unit): unit.index for unit in source}
    return {
        unit.index: where[loose_signature(unit)]
        for unit in target
        if ours[loose_signature(unit)] == theirs[loose_signature(unit)] == 1 and unit.kind != "buffer"
    }


def graph_colours(units: Sequence[Unit], flow: Dataflow) -> dict[int, int]:
    """Weisfeiler-Leman colours of the dataflow: layers of one colour cannot be told apart by shapes and connections."""
    before, after = producers(units, flow)
    colours = _numbered({unit.index: (loose_signature(unit), tuple(sorted(unit.roles))) for unit in units})
    for _ in range(len(units)):
        refined = _numbered(
            {
                index: (
                    colour,
                    tuple(sorted(colours[other] for other in before[index] if other in colours)),
                    tuple(sorted(colours[other] for other in after[index] if other in colours)),
                )
                for index, colour in colours.items()
            }
        )
        if len(set(refined.values())) == len(set(colours.values())):
            return refined
        colours = refined
    return colours


def _numbered(values: Mapping[int, object]) -> dict[int, int]:
    """Small numbers for equal values, in an order that does not depend on hashing."""
    numbers: dict[str, int] = {}
    return {index: numbers.setdefault(repr(value), len(numbers)) for index, value in values.items()}
