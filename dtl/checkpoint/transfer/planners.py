"""Which planner answers to which `by`, and the translation of names that comes before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dtl.checkpoint.transfer.layers.names import Renaming, looks_sorted, rename
from dtl.checkpoint.transfer.layers.target import Target, target_of
from dtl.checkpoint.transfer.layers.trace import Dataflow
from dtl.checkpoint.transfer.layers.units import Entry, Key, Unit, units_of
from dtl.checkpoint.transfer.match.auto import match_auto
from dtl.checkpoint.transfer.match.by_map import Rule, match_map, read_rules
from dtl.checkpoint.transfer.match.by_name import kernels, match_names, renamed_entries
from dtl.checkpoint.transfer.match.by_order import match_strict_order
from dtl.checkpoint.transfer.match.decided import Side
from dtl.checkpoint.transfer.match.heads import detect_heads
from dtl.checkpoint.transfer.match.matching import Flag, Match, Matching
from dtl.checkpoint.transfer.match.trust import Trust, trust_names, with_settled
from dtl.checkpoint.transfer.match.views import first_layer
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

    def first(self) -> int | None:
        """The target's layer that sees the input."""
        return first_layer(self.target.units, self.target.dataflow)


@dataclass(frozen=True)
class Planned:
    matching: Matching
    prefix: tuple[str, str]
    inside: frozenset[str] | None = None
    """Source tensors under the prefix; None where there is none and all belong to the network."""


def match(request: PlanRequest) -> Planned:
    """Run the planner that `by` names; the matching speaks of the source's tensors by their own names."""
    request = replace(request, ordered=request.in_order)
    rules = _rules(request)
    if request.by == "map":
        chosen = frozenset(entry.name for entry in request.source if entry.name.startswith(request.prefix)) if request.prefix else None
        return Planned(match_map(rules, request.source, request.target.entries), ("", ""), chosen)
    settled = match_map(rules, request.source, request.target.entries) if rules else Matching("map")
    if settled.refusals:
        return Planned(settled, ("", ""))
    if request.source_model is not None:
        return _with_source_model(request, settled)
    renaming = rename(request.source, request.target.entries, prefix=request.prefix)
    channels_last = kernels(request.source, renaming)
    renamed = renamed_entries(request.source, renaming, turned=channels_last)
    if request.by in ("order", "strict"):
        matching = _by_order(replace(request, source=renamed))
    elif renaming.rivals:
        matching = _rivals(renaming)
    elif request.by == "name":
        matching = match_names(renamed, request.target.units, heads=request.heads, first=request.first)
    else:
        matching = _auto(replace(request, source=renamed), None, _renamed(settled, renaming))
        matching.head_rows = settled.head_rows
    if renaming.hits and not renaming.rivals and renaming.source_prefix != renaming.target_prefix:
        matching.notes.append(f"prefix '{renaming.source_prefix}' stands for '{renaming.target_prefix}'")
    matching = _own_names(matching, renaming)
    _turn_kernels(matching, channels_last)
    return Planned(matching, (renaming.source_prefix, renaming.target_prefix), renaming.inside)


def _turn_kernels(matching: Matching, channels_last: set[str]) -> None:
    """Kernels planned in torch's layout are turned when applied; what needs a second transform on top is left undecided."""
    for name, found in list(matching.matches.items()):
        if found.source not in channels_last:
            continue
        if found.transform:
            del matching.matches[name]
            matching.flags[name] = Flag(f"a channels-last kernel that would need {found.transform} as well", ((found.source, found.transform),))
        else:
            matching.matches[name] = replace(found, transform="transpose_kernel")


def _rules(request: PlanRequest) -> list[Rule]:
    if request.mapping is None:
        if request.by == "map":
            raise UserError("by: map needs a map (a YAML or JSON file, or a dict)")
        return []
    if request.by not in ("map", "auto"):
        raise UserError(f"by: {request.by} takes no map; use by: map, or by: auto to settle single layers")
    return read_rules(request.mapping)


def _renamed(settled: Matching, renaming: Renaming) -> dict[str, Match]:
    """What the user's map settles, in the names that the planner uses for the source."""

    def now(key: Key) -> Key:
        names = renaming.renamed
        return tuple(names.get(name, name) for name in key) if isinstance(key, tuple) else names.get(key, key)

    return {target: replace(found, source=now(found.source)) for target, found in settled.matches.items()}


def _auto(request: PlanRequest, source_flow: Dataflow | None, settled: dict[str, Match], *, names: bool = True) -> Matching:
    """Names first; where these leave layers on both sides, the views of structure.

    `settled`: pairs given by the user's map. `names`: whether the names are the source's own and may be used.
    """
    source, target = units_of(request.source, like=request.target.units), request.target.units
    if source_flow is None and not request.in_order and any(unit.flat for unit in source):
        return _nothing_to_go_by()
    if names:
        named = match_names(request.source, target, heads=request.heads, first=request.first)
        trust = trust_names(named, source, target, request.heads)
    else:
        named, trust = Matching("names"), Trust(False, distrusted={unit.index for unit in target}, numbers=False)
    if settled:
        trust = with_settled(trust, settled, source, target)
    used = set(trust.anchors.values())
    apart = {id(unit) for unit in (*request.heads, *detect_heads(source))}
    left = [unit for unit in source if unit.index not in used and id(unit) not in apart]
    complete = not left or all(unit.index in trust.anchors or id(unit) in apart for unit in target)
    # Tracing costs up to a second, so it is done only where something is left to decide.
    flow = None if complete else request.target.dataflow
    matching = match_auto(
        Side(source, source_flow),
        Side(target, flow),
        named=named,
        trust=trust,
        heads=request.heads,
        in_order=request.in_order,
        assume_order=request.assume_order,
    )
    matching.matches.update(settled)
    matching.flags = {name: flag for name, flag in matching.flags.items() if name not in settled}
    return matching


def _nothing_to_go_by() -> Matching:
    matching = Matching("nothing")
    matching.refusals.append("the source's names say nothing, and its order is lost (the names are sorted): only a map can place its tensors")
    return matching


def _with_source_model(request: PlanRequest, settled: Matching) -> Planned:
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
    matching = _auto(replace(request, source=entries, source_model=None), flow, _renamed(settled, Renaming(own)), names=spoken)
    matching.head_rows = settled.head_rows
    return Planned(_own_names(matching, Renaming(own)), ("", ""), frozenset(own))


def _names_in(source: list[Entry], network: Target, in_order: bool, prefix: str | None) -> tuple[dict[str, str] | None, bool]:
    """(source tensor -> its name in the network it was made for, whether the source itself has these names).

    By names, else by the whole sequence of shapes; (None, False) where neither fits.
    """
    shapes = {entry.name: entry.shape for entry in network.entries}
    renaming = rename(source, network.entries, prefix=prefix)
    fits = {name: now for name, now in renaming.renamed.items() if now in shapes and name in renaming.inside}
    wrong = [entry for entry in source if entry.name in fits and shapes[fits[entry.name]] != entry.shape]
    learned = [entry for entry in network.entries if not entry.is_counter]
    whole = len(fits) >= 0.9 * len(renaming.inside)
    if not renaming.rivals and not wrong and whole and len(set(fits.values()) & {entry.name for entry in learned}) >= 0.9 * len(learned):
        return fits, True
    if not in_order:
        return None, False
    ours = [entry for entry in source if not entry.is_counter]
    head = {name for unit in detect_heads(network.units) for name in unit.names}
    for theirs in (learned, [entry for entry in learned if entry.name not in head]):
        if [entry.shape for entry in ours] == [entry.shape for entry in theirs]:
            counters = [[entry for entry in side if entry.is_counter] for side in (source, network.entries)]
            both = zip(*counters) if len(counters[0]) == len(counters[1]) else ()
            return {a.name: b.name for a, b in (*zip(ours, theirs), *both)}, False
    return None, False


def _by_order(request: PlanRequest) -> Matching:
    if not request.in_order:
        matching = Matching(view="order")
        matching.refusals.append(
            f"by: {request.by} needs the order in which the network registered its tensors, and this source's names are sorted "
            "(safetensors keeps no order); use by: name, auto or map"
        )
        return matching
    strict = match_strict_order(request.source, request.target.entries, heads=request.heads)
    if not strict.refusals or request.by == "strict":
        return strict
    # Not the same sequence: align the layers, with gaps, by position alone.
    aligned = _auto(replace(request, assume_order=True), None, {}, names=False)
    if not aligned.matches:
        aligned.clashes = strict.clashes
    aligned.notes += strict.refusals
    return aligned


def _rivals(renaming: Renaming) -> Matching:
    matching = Matching(view="names")
    both = "', '".join((renaming.source_prefix, *renaming.rivals))
    matching.refusals.append(
        f"the source holds several networks that fit equally well, with the prefixes '{both}'; choose one with source: FILE#{renaming.source_prefix}"
    )
    return matching


def _own_names(matching: Matching, renaming: Renaming) -> Matching:
    """Back from the target's terms to the names in the source."""
    own = {now: name for name, now in renaming.renamed.items()}

    def back(key: Key) -> Key:
        return tuple(own.get(name, name) for name in key) if isinstance(key, tuple) else own.get(key, key)

    matching.matches = {name: replace(found, source=back(found.source)) for name, found in matching.matches.items()}
    matching.flags = {name: replace(flag, alternatives=tuple((back(key), how) for key, how in flag.alternatives)) for name, flag in matching.flags.items()}
    matching.clashes = [replace(clash, source=own.get(clash.source, clash.source)) for clash in matching.clashes]
    return matching


def names_in_network(source: list[Entry], network: nn.Module) -> dict[str, str]:
    """Source tensor -> its name in the network it was made for; UserError where neither names nor shapes tell."""
    own, _ = _names_in(source, target_of(network, trace=False), not looks_sorted(source), None)
    if own is None:
        raise UserError("source_model: its tensors are not those of the source, neither by names nor by the sequence of shapes")
    return own
