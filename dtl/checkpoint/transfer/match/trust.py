"""How far equal names can be believed: which layers they pair beyond doubt, and where their numbers have shifted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dtl.checkpoint.transfer.layers.units import WEIGHTED, Unit
from dtl.checkpoint.transfer.match.matching import Match, Matching

MOST_AGREE = 0.6
"""Least share of same-named layers that must have the same shape: below it the names mean other layers."""
MOST_NAMED = 0.9
"""Least share of one side's layers that must have a namesake, for names to be believed as a whole."""
SOME_NAMED = ((0.9, 0.5), (1.0, 0.2))
"""(least share of namesakes that agree, least share that has one) for believing the namesakes alone: blocks were put in and
taken out. No lower than this: a stem and a head of common names say nothing of the blocks between."""


@dataclass
class Trust:
    """`anchors`: target unit -> source unit of the same name, believed. `distrusted`: target units whose name says nothing.

    `as_a_whole`: same names have the same shapes nearly everywhere, and cover nearly all of one side. `numbers`: whether numbers
    in names may be used at all. `mapped`: anchors that the user's map gave. `new_names`: namesakes are believed, so that a
    layer without one is a new layer, unless more than its shape speaks for it.
    """

    as_a_whole: bool
    anchors: dict[int, int] = field(default_factory=dict)
    distrusted: set[int] = field(default_factory=set)
    numbers: bool = True
    mapped: set[int] = field(default_factory=set)
    new_names: bool = False


def trust_names(matching: Matching, source: Sequence[Unit], target: Sequence[Unit], heads: Sequence[Unit]) -> Trust:
    """Judge a matching by names. Numbered lists that have shifted are believed nowhere: those in which a layer clashes with its
    namesake, while a neighbour in the same list has its shape, and those that both sides number from another beginning."""
    own = {name: unit.index for unit in source for name in unit.names}
    apart = {unit.index for unit in heads}
    paired: dict[int, int] = {}
    for unit in target:
        sources = {own[str(matching.matches[name].source)] for name in unit.names if name in matching.matches}
        if len(sources) == 1:
            paired[unit.index] = sources.pop()
    clashed = {clash.target for clash in matching.clashes}
    clashing = [unit for unit in target if clashed.intersection(unit.names)]
    kinds_changed = [unit for unit in target if any(name in matching.flags for name in unit.names) and unit not in clashing]
    agree = len(paired) / max(1, len(paired) + len(clashing))
    counted = [unit for unit in target if unit.index not in apart]
    namesakes = len(clashing) + len(kinds_changed)
    share = max(
        (sum(unit.index in paired for unit in counted) + namesakes) / max(1, len(counted)),
        (len(set(paired.values())) + namesakes) / max(1, len(source)),
    )
    if len(clashing) > 2 and agree < MOST_AGREE:
        return Trust(False, distrusted={unit.index for unit in target})
    shifted = _shifted_lists(clashing, source) | _renumbered_lists(source, target)
    distrusted = {unit.index for unit in target if any(_in_list(unit.path, each) for each in shifted)}
    believed = {j: i for j, i in paired.items() if j not in distrusted}
    if share >= MOST_NAMED:
        return Trust(True, believed, distrusted, new_names=True)
    agreeing = len(paired) / max(1, len(paired) + namesakes)
    if any(agreeing >= least and share >= named for least, named in SOME_NAMED):
        return Trust(False, believed, distrusted, new_names=True)
    # Not believed, but spoken: enough for a new name beside them to be in doubt.
    return Trust(False, distrusted=distrusted, new_names=agreeing >= 0.5 and share >= SOME_NAMED[-1][1])


def _renumbered_lists(source: Sequence[Unit], target: Sequence[Unit]) -> set[str]:
    """Numbered lists (as what stands before the number) in which each side has numbers that the other has not.

    0 to 11 against 1 to 12: the same blocks, counted from another beginning. A namesake is then another block of the same
    shape. Where one side's numbers are all among the other's, blocks were added or left out, and the names hold.
    """
    ours, theirs = _numbers(source), _numbers(target)
    return {before for before, numbers in theirs.items() if before in ours and numbers - ours[before] and ours[before] - numbers}


def _numbers(units: Sequence[Unit]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for unit in units:
        for number in re.finditer(r"\d+", unit.path):
            found.setdefault(unit.path[: number.start()], set()).add(int(number.group()))
    return found


def _shifted_lists(clashing: Sequence[Unit], source: Sequence[Unit]) -> set[str]:
    """Numbered lists, as what stands before the number, in which a namesake's neighbour has the wanted shape."""
    shapes = {unit.path: unit.signature for unit in source}
    found = set()
    # Norms have few shapes, which say little; a convolution with a neighbour's shape does.
    for unit in (each for each in clashing if each.kind in WEIGHTED):
        for number in re.finditer(r"\d+", unit.path):
            before, after = unit.path[: number.start()], unit.path[number.end() :]
            pattern = re.compile(re.escape(before) + r"\d+" + re.escape(after) + r"$")
            if any(pattern.match(path) and signature == unit.signature for path, signature in shapes.items()):
                found.add(before)
    return found


def _in_list(path: str, before: str) -> bool:
    return path.startswith(before) and path[len(before) : len(before) + 1].isdigit()


def with_settled(trust: Trust, settled: Mapping[str, Match], source: Sequence[Unit], target: Sequence[Unit]) -> Trust:
    """The layers that the user's map pairs become anchors, before anything that names say."""
    ours = {name: unit.index for unit in source for name in unit.names}
    theirs = {name: unit.index for unit in target for name in unit.names}
    given = {theirs[name]: ours[match.source] for name, match in settled.items() if isinstance(match.source, str)}
    taken = set(given.values())
    anchors = {j: i for j, i in trust.anchors.items() if i not in taken and j not in given}
    return replace(trust, anchors={**anchors, **given}, mapped=set(given))
