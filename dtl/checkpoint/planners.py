"""Which planner answers to which `by`, and the translation of names that comes before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dtl.checkpoint.auto import Side, match_auto
from dtl.checkpoint.by_name import match_names, renamed_entries
from dtl.checkpoint.by_order import match_strict_order
from dtl.checkpoint.matching import Matching
from dtl.checkpoint.names import Renaming, looks_sorted, rename
from dtl.checkpoint.target import Target, target_of
from dtl.checkpoint.trace import Dataflow
from dtl.checkpoint.trust import Trust, trust_names
from dtl.checkpoint.units import Entry, Key, Unit, units_of
from dtl.errors import UserError


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
    request = replace(request, ordered=request.in_order)
    if request.source_model is not None:
        return _with_source_model(request)
    renaming = rename(request.source, request.target.entries, prefix=request.prefix)
    renamed = renamed_entries(request.source, renaming)
    if request.by == "order":
        matching = _by_order(replace(request, source=renamed))
    elif renaming.rivals:
        matching = _rivals(renaming)
    elif request.by == "name":
        matching = match_names(renamed, request.target.units, heads=request.heads)
    else:
        matching = _auto(replace(request, source=renamed), source_flow=None)
    if renaming.hits and not renaming.rivals and renaming.source_prefix != renaming.target_prefix:
        matching.notes.append(f"prefix '{renaming.source_prefix}' stands for '{renaming.target_prefix}'")
    return Planned(_own_names(matching, renaming), (renaming.source_prefix, renaming.target_prefix))


def _auto(request: PlanRequest, *, source_flow: Dataflow | None, names: bool = True) -> Matching:
    """Names first; where these leave layers on both sides, the views of structure. `names`: whether they are the source's own."""
    source, target = units_of(request.source), request.target.units
    if names:
        named = match_names(request.source, target, heads=request.heads)
        trust = trust_names(named, source, target, request.heads)
    else:
        named, trust = Matching("names"), Trust(False, distrusted={unit.index for unit in target}, numbers=False)
    used = set(trust.anchors.values())
    left = [unit for unit in source if unit.index not in used]
    complete = not left or all(unit.index in trust.anchors for unit in target)
    # Tracing costs up to a second, so it is done only where something is left to decide.
    flow = None if complete else request.target.dataflow
    return match_auto(
        Side(source, source_flow),
        Side(target, flow),
        named=named,
        trust=trust,
        heads=request.heads,
        in_order=request.in_order,
        assume_order=request.assume_order,
    )


def _with_source_model(request: PlanRequest) -> Planned:
    """Speak of the source in the names of its own network, whose execution order and dataflow are then known."""
    assert request.source_model is not None
    network = target_of(request.source_model, image_size=request.image_size)
    own, spoken = _names_in(request.source, network, request.in_order, request.prefix)
    if own is None:
        raise UserError("source_model: its tensors are not those of the source, neither by names nor by the sequence of shapes")
    flow = network.dataflow
    if flow is None:
        raise UserError("source_model: it cannot be run on the meta device, so its dataflow is not to be had")
    entries = [Entry(own[e.name], e.shape, e.family) for e in request.source if e.name in own]
    matching = _auto(replace(request, source=entries, source_model=None), source_flow=flow, names=spoken)
    return Planned(_own_names(matching, Renaming(own)), ("", ""))


def _names_in(source: list[Entry], network: Target, in_order: bool, prefix: str | None) -> tuple[dict[str, str] | None, bool]:
    """(source tensor -> its name in the network it was made for, whether the source itself has these names).

    By names, else by the whole sequence of shapes; (None, False) where neither fits.
    """
    shapes = {entry.name: entry.shape for entry in network.entries}
    renaming = rename(source, network.entries, prefix=prefix)
    fits = {name: now for name, now in renaming.renamed.items() if now in shapes}
    wrong = [entry for entry in source if entry.name in fits and shapes[fits[entry.name]] != entry.shape]
    learned = [entry for entry in network.entries if not entry.is_counter]
    if not renaming.rivals and not wrong and len(set(fits.values()) & {entry.name for entry in learned}) >= 0.9 * len(learned):
        return fits, True
    if not in_order:
        return None, False
    ours = [entry for entry in source if not entry.is_counter]
    if [entry.shape for entry in ours] != [entry.shape for entry in learned]:
        return None, False
    return {a.name: b.name for a, b in zip(ours, learned)}, False


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



