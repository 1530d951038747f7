"""How much of either network a transfer uses: too little of one means that these are not the same network.

Counted are convolution and linear layers. Of the target: those that get weights, a replaced head aside. Of the source: those
that are used, its own head aside where that is not. Both must reach `min_coverage`: ResNet-101 holds every name of ResNet-50 with
the right shape, fills all of it, and yet half of its layers have no place there; what it computed is lost.

What does not count of the source: what lies outside the prefix that was chosen (`FILE#encoder_q.`) or found (a detector's `neck.`
and `head.` beside `backbone.`, which alone is spoken of then), and what is set aside by name (`ignore`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from dtl.checkpoint.transfer.layers.units import WEIGHTED, Entry, Unit
from dtl.checkpoint.transfer.match.heads import detect_heads
from dtl.errors import UserError


def set_aside(source: Sequence[Entry], ignore: Sequence[str]) -> tuple[list[Entry], list[Entry]]:
    """(tensors to transfer, tensors whose names fit a pattern of `ignore`). UserError on a pattern without a hit."""
    for pattern in ignore:
        if not any(fnmatchcase(entry.name, pattern) for entry in source):
            names = ", ".join(entry.name for entry in source[:3])
            raise UserError(f"ignore: {pattern} fits no tensor of the source (they are called {names} ...)")
    aside = {entry.name for entry in source if any(fnmatchcase(entry.name, pattern) for pattern in ignore)}
    return [entry for entry in source if entry.name not in aside], [entry for entry in source if entry.name in aside]


def source_units_that_count(units: Sequence[Unit], used: Collection[str], inside: Collection[str] | None, heads_here: Sequence[Unit]) -> list[Unit]:
    """The source's convolution and linear layers that a transfer of this network should use. `heads_here`: the target's heads, whose
    namesakes in the source are its heads, wherever they are registered."""
    heads = {unit.index for unit in (*detect_heads(units), *(unit for unit in units if any(_is_namesake(unit, head) for head in heads_here)))}
    weighted = [unit for unit in units if unit.kind in WEIGHTED and (inside is None or any(name in inside for name in unit.names))]
    return [unit for unit in weighted if unit.index not in heads or _is_used(unit, used)]


def _is_namesake(unit: Unit, head: Unit) -> bool:
    return (unit.path == head.path or unit.path.endswith("." + head.path)) and unit.shape[1:] == head.shape[1:]


def source_coverage(units: Sequence[Unit], used: Collection[str]) -> float:
    """Share of these layers of which anything is used."""
    return sum(_is_used(unit, used) for unit in units) / len(units) if units else float(bool(used))


def why_too_little_is_used(units: Sequence[Unit], used: Collection[str], least: float) -> str | None:
    """The refusal of a transfer that leaves most of the source behind, with the one option that accepts it."""
    share = source_coverage(units, used)
    if share >= least:
        return None
    left = [unit for unit in units if not _is_used(unit, used)]
    return (
        f"coverage {share:.0%} of the source's convolution and linear layers is under min_coverage {least:.0%}: it holds another or a "
        f"larger network; the first of its layers without a place here is {left[0].path} {list(left[0].shape)}. If that is meant: "
        f"{_accepting(units, used, least, share)}"
    )


def _accepting(units: Sequence[Unit], used: Collection[str], least: float, share: float) -> str:
    """`ignore` where whole parts of the source go unused (a decoder, a second network), else the lower threshold."""
    parts: dict[str, list[Unit]] = {}
    for unit in units:
        parts.setdefault(unit.path.partition(".")[0], []).append(unit)
    unused = [part for part, members in parts.items() if not any(_is_used(unit, used) for unit in members)]
    rest = [unit for part, members in parts.items() if part not in unused for unit in members]
    if 0 < len(unused) <= 4 and rest and source_coverage(rest, used) >= least:
        return "ignore: [" + ", ".join(f"'{part}.*'" for part in unused) + "]"
    return f"min_coverage: {int(100 * share) / 100}"


def _is_used(unit: Unit, used: Collection[str]) -> bool:
    return any(name in used for name in unit.names)
