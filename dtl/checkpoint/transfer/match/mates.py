"""Norms beside their layers: a norm is the one that follows a certain layer, on either side, whatever else has its shape.

Which layer a norm follows is read off the dataflow where it is known, else off names; never off the order of registration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dtl.checkpoint.transfer.layers.links import links_by_dataflow, links_by_names
from dtl.checkpoint.transfer.match.decided import Side


class Mates:
    """`ours`, `theirs`: norm -> the one layer that it follows, in the source and in the target."""

    def __init__(self, source: Side, target: Side) -> None:
        self.ours, self.theirs = _layers(source), _layers(target)
        self._shapes = {unit.index: unit.signature for unit in source.units}, {unit.index: unit.signature for unit in target.units}

    def agree(self, i: int, j: int, certain: Mapping[int, int]) -> bool:
        """Whether source norm `i` and target norm `j` follow layers that are each other's."""
        layer, mate = self.theirs.get(j), self.ours.get(i)
        return layer is not None and mate is not None and certain.get(layer) == mate

    def pairs(self, certain: Mapping[int, int]) -> dict[int, int]:
        """Target -> source for norms of one shape behind layers that are each other's, where each is the only one behind its layer."""
        alone = Counter(self.ours.values()), Counter(self.theirs.values())
        behind = {layer: i for i, layer in self.ours.items() if alone[0][layer] == 1}
        found = {}
        for j, layer in self.theirs.items():
            if layer not in certain or alone[1][layer] != 1:
                continue
            i = behind.get(certain[layer])
            if i is not None and self._shapes[0][i] == self._shapes[1][j]:
                found[j] = i
        return found


def _layers(side: Side) -> dict[int, int]:
    if side.flow is None:
        return links_by_names(side.units)
    posts = {norm: [other for way, other in sorted(found) if way == "post"] for norm, found in links_by_dataflow(side.units, side.flow).items()}
    return {norm: layers[0] for norm, layers in posts.items() if len(layers) == 1}
