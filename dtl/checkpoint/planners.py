"""Which planner answers to which `by`, and the translation of names that comes before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dtl.checkpoint.by_name import match_names, renamed_entries
from dtl.checkpoint.by_order import match_strict_order
from dtl.checkpoint.matching import Matching
from dtl.checkpoint.names import Renaming, looks_sorted, rename
from dtl.checkpoint.target import Target
from dtl.checkpoint.units import Entry, Key, Unit


@dataclass(frozen=True)
class PlanRequest:
    source: list[Entry]
    target: Target
    heads: list[Unit]
    by: str
    assume_order: bool = False
    source_model: nn.Module | None = None
    mapping: Any = None
    ordered: bool | None = None
    prefix: str | None = None
    image_size: int | None = None

    @property
    def in_order(self) -> bool:
        """Whether the source's sequence can be the order of registration."""
        return not looks_sorted(self.source) if self.ordered is None else self.ordered


@dataclass(frozen=True)
class Planned:
    matching: Matching
    prefix: tuple[str, str]


def match(request: PlanRequest) -> Planned:
    """Run the planner that `by` names; the matching speaks of the source's tensors by their own names."""
    renaming = rename(request.source, request.target.entries, prefix=request.prefix)
    renamed = renamed_entries(request.source, renaming)
    if request.by == "order":
        matching = _by_order(replace(request, source=renamed))
    elif renaming.rivals:
        matching = _rivals(renaming)
    else:
        matching = match_names(renamed, request.target.units, heads=request.heads)
        few = len(matching.matches) < 0.5 * len(request.target.entries)
        if request.by == "auto" and (few or matching.refusals) and request.assume_order and request.in_order:
            in_order = match_strict_order(renamed, request.target.entries, heads=request.heads)
            matching = matching if in_order.refusals else in_order
    if renaming.hits and not renaming.rivals and renaming.source_prefix != renaming.target_prefix:
        matching.notes.append(f"prefix '{renaming.source_prefix}' stands for '{renaming.target_prefix}'")
    return Planned(_own_names(matching, renaming), (renaming.source_prefix, renaming.target_prefix))


def _by_order(request: PlanRequest) -> Matching:
    if not request.in_order:
        matching = Matching(view="order")
        matching.refusals.append(
            "by: order needs the order in which the network registered its tensors, and this source's names are sorted "
            "(safetensors keeps no order); use by: name, auto or map"
        )
        return matching
    return match_strict_order(request.source, request.target.entries, heads=request.heads)


def _rivals(renaming: Renaming) -> Matching:
    matching = Matching(view="names")
    both = "', '".join((renaming.source_prefix, *renaming.rivals))
    matching.refusals.append(
        f"the source holds several networks that fit equally well, with the prefixes '{both}'; choose one with "
        f"source: FILE#{renaming.source_prefix}"
    )
    return matching


def _own_names(matching: Matching, renaming: Renaming) -> Matching:
    """Back from the target's terms to the names in the source."""
    own = {now: name for name, now in renaming.renamed.items()}

    def back(key: Key) -> Key:
        return tuple(own.get(name, name) for name in key) if isinstance(key, tuple) else own.get(key, key)

    matching.matches = {name: replace(found, source=back(found.source)) for name, found in matching.matches.items()}
    matching.flags = {
        name: replace(flag, alternatives=tuple(own.get(other, other) for other in flag.alternatives)) for name, flag in matching.flags.items()
    }
    matching.clashes = [replace(clash, source=own.get(clash.source, clash.source)) for clash in matching.clashes]
    return matching



