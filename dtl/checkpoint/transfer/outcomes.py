"""From a matching to outcomes: what happens to each tensor, and whether the whole may be applied.

The rules that hold whatever planner made the matching: the head, layers never half loaded, norms never beside a foreign
convolution, coverage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dtl.checkpoint.transfer.coverage import source_coverage, source_units_that_count, why_too_little_is_used
from dtl.checkpoint.transfer.folding import fold_orphans
from dtl.checkpoint.transfer.layers.links import links_by_dataflow, links_by_neighbours
from dtl.checkpoint.transfer.layers.target import Target
from dtl.checkpoint.transfer.layers.units import NORMS, WEIGHTED, Entry, Key, Shape, Unit, num_elements, units_of
from dtl.checkpoint.transfer.match.heads import detect_heads, head_obstacle, rows_of_head
from dtl.checkpoint.transfer.match.matching import Matching
from dtl.text import counted


@dataclass(frozen=True)
class Outcome:
    """What becomes of one tensor.

    `outcome`: loaded (copied), adapted (through `transform`), filled (a value that is known without the source), kept (an
    integer table of the architecture), fresh (keeps its initial value), ambiguous (fresh unless settled), unused (a source
    tensor that goes nowhere; `target` is None then). `parameters` is its number of elements.
    """

    target: str | None
    source: Key | None
    outcome: str
    reason: str
    evidence: str = ""
    transform: str = ""
    margin: float | None = None
    alternatives: tuple[str, ...] = ()
    shape: Shape = ()
    source_shape: Shape | None = None
    parameters: int = 0
    head: bool = False


@dataclass(frozen=True)
class Policy:
    keep_head: bool | Literal["rows"] | None = None
    head_rows: Mapping[str, str | Sequence[str]] | None = None
    source_classes: Sequence[str] | None = None
    target_classes: Sequence[str] | None = None
    on_ambiguous: Literal["error", "fresh"] = "error"
    min_coverage: float = 0.6
    fill: dict[str, str] = field(default_factory=dict)
    fold_norms: bool = False


@dataclass(frozen=True)
class Settled:
    outcomes: tuple[Outcome, ...]
    coverage: float
    source_coverage: float
    refusals: tuple[str, ...]
    head_rows: tuple[tuple[int, ...], ...] | None = None


def settle(
    matching: Matching,
    source: list[Entry],
    target: Target,
    heads: Sequence[Unit],
    policy: Policy,
    *,
    inside: Collection[str] | None = None,
    ignored: Sequence[Entry] = (),
) -> Settled:
    """`inside`: the source's tensors that belong to the network asked for (None: all). `ignored`: those set aside before."""
    return _Settlement(matching, source, target, heads, policy, inside, ignored).run()


class _Settlement:
    def __init__(
        self,
        matching: Matching,
        source: list[Entry],
        target: Target,
        heads: Sequence[Unit],
        policy: Policy,
        inside: Collection[str] | None,
        ignored: Sequence[Entry],
    ) -> None:
        self.matching, self.source, self.target, self.policy = matching, source, target, policy
        self.inside, self.ignored = inside, ignored
        self.heads = {unit.index for unit in heads}
        self.head_names = {name for unit in heads for name in unit.names}
        self.matches = dict(matching.matches)
        self.source_shapes = {entry.name: entry.shape for entry in source}
        self.source_units = units_of(source)
        self.reasons: dict[str, str] = {}
        clashed = {clash.target: clash for clash in matching.clashes}
        for unit in target.units:
            for clash in (clashed[name] for name in unit.names if name in clashed):
                self.reasons.update(dict.fromkeys(unit.names, f"same name, other shape: {clash}"))
        self.head_rows = matching.head_rows
        self.filled: dict[str, str] = {}
        self.doubts: list[str] = []
        self.hard = list(matching.refusals)

    def run(self) -> Settled:
        for unit in self.target.units:
            if unit.index in self.heads:
                self._head(unit)
            elif unit.kind in WEIGHTED:
                self._weighted(unit)
            elif unit.kind == "bn":
                self._batch_norm(unit)
        if self.policy.fold_norms:
            self._fold()
        self._ties()
        self._norms_of_fresh_layers()
        self._lonely_norms()
        coverage, used = self._coverage(), self._used()
        heads = [unit for unit in self.target.units if unit.index in self.heads]
        counted = source_units_that_count(self.source_units, used, self.inside, heads)
        used_share = source_coverage(counted, used)
        self._judge(coverage, why_too_little_is_used(counted, used, self.policy.min_coverage))
        if self.hard:
            self.matches, self.filled = {}, {}
        outcomes = [self._outcome(entry) for entry in self.target.entries] + self._unused()
        if not self.hard and not any(o.outcome in ("loaded", "adapted") for o in outcomes):
            self.hard.append("nothing would be loaded")
        doubts = self.doubts if self.policy.on_ambiguous == "error" else []
        return Settled(tuple(outcomes), coverage, used_share, tuple(self.hard or doubts), self.head_rows)

    # --- single layers ---

    def _drop(self, unit: Unit, reason: str) -> None:
        for name in unit.names:
            self.matches.pop(name, None)
            self.reasons[name] = reason

    def _head(self, unit: Unit) -> None:
        classes = self.policy.source_classes, self.policy.target_classes
        why = head_obstacle(unit, self.matches, self.source_units, classes, self.policy.keep_head)
        if self.policy.keep_head == "rows" and (why or self.policy.head_rows):
            chosen = rows_of_head(unit, self.source_units, classes, self.policy.head_rows)
            why = chosen if isinstance(chosen, str) else ""
            if not isinstance(chosen, str):
                self.matches.update(chosen[0])
                self.head_rows = chosen[1]
        if not why:
            return
        self._drop(unit, f"head: {why}")
        for name in unit.names:
            self.matching.flags.pop(name, None)
        if self.policy.keep_head in (True, "rows"):
            self.hard.append(f"keep_head was asked for, but {unit.path} cannot be kept: {why}")

    def _weighted(self, unit: Unit) -> None:
        weight = unit.roles.get("weight")
        if weight is None:
            return
        names = _names(weight[0])
        have = all(name in self.matches for name in names)
        for role, (key, _) in unit.roles.items():
            if role != "bias":
                continue
            for name in _names(key):
                if not have and name in self.matches:
                    del self.matches[name]
                    self.reasons[name] = "the layer's weight has no source"
                elif have and name not in self.matches:
                    self._bias_without_source(name)

    def _bias_without_source(self, name: str) -> None:
        if self.policy.fill.get("conv_bias") == "zero":
            self.filled[name] = "zero: the source's layer has no bias"
        else:
            self.reasons[name] = "the source's layer has no bias (fill conv_bias: zero makes it the same function)"

    def _batch_norm(self, unit: Unit) -> None:
        wanted = [_names(unit.roles[role][0])[0] for role in unit.roles if role != "num_batches_tracked"]
        found = [name for name in wanted if name in self.matches]
        counter = unit.roles.get("num_batches_tracked")
        if not found:
            self._drop(unit, self.reasons.get(unit.names[0], "")) if counter else None
            return
        if len(found) < len(wanted):
            missing = next(name for name in wanted if name not in self.matches)
            self._drop(unit, f"half a norm is none: {missing} has no source")
            self.doubts.append(f"{unit.path}: the source has its {found[0]} but no {missing}; a norm without its statistics is not loaded")
            return
        if counter is not None and counter[0] not in self.matches:
            self.filled[_names(counter[0])[0]] = "zero: the source keeps no counter"

    def _fold(self) -> None:
        folded = fold_orphans(self.matches, self.source_units, self.target)
        self.matches.update(folded)
        for name in folded:
            self.filled.pop(name, None)

    # --- the whole ---

    def _ties(self) -> None:
        for name, first in self.target.ties.items():
            if first in self.matches:
                self.matches[name] = self.matches[first]
            elif name in self.matches:
                self.matches[first] = self.matches[name]

    def _norms_of_fresh_layers(self) -> None:
        """Statistics of another layer's outputs are worse than none: a norm behind a layer without a source stays fresh too."""
        loose = [u for u in self.target.units if u.kind in WEIGHTED and u.index not in self.heads and not self._is_matched(u)]
        if not loose:
            return
        flow = self.target.dataflow
        links = links_by_dataflow(self.target.units, flow) if flow else links_by_neighbours(self.target.units)
        fresh = {unit.index: unit for unit in loose}
        for unit in self.target.units:
            if unit.kind not in NORMS or not self._is_matched(unit) or self._by_map(unit):
                continue
            layers = [other for side, other in links.get(unit.index, ()) if side == "post"]
            if len(layers) == 1 and layers[0] in fresh:
                self._drop(unit, f"its layer {fresh[layers[0]].path} has no source")
                for name in unit.names:
                    self.filled.pop(name, None)

    def _by_map(self, unit: Unit) -> bool:
        return any(name in self.matches and self.matches[name].evidence == "map" for name in unit.names)

    def _lonely_norms(self) -> None:
        flow = self.target.dataflow if self._any_fresh_norm() else None
        links = links_by_dataflow(self.target.units, flow) if flow else links_by_neighbours(self.target.units)
        by_index = {unit.index: unit for unit in self.target.units}
        for unit in self.target.units:
            if unit.kind not in NORMS or self._is_matched(unit):
                continue
            beside = [other for side, other in sorted(links.get(unit.index, ())) if side == "post" and self._is_matched(by_index[other])]
            if beside and not any(name in self.matching.flags for name in unit.names):
                why = f"stays fresh beside {by_index[beside[0]].path}, which is loaded: the source has no norm for it"
                self.doubts.append(f"{unit.path} {why}")
                for name in unit.names:
                    self.reasons[name] = why

    def _any_fresh_norm(self) -> bool:
        return any(unit.kind in NORMS and not self._is_matched(unit) for unit in self.target.units)

    def _is_matched(self, unit: Unit) -> bool:
        main = unit.roles.get("weight") or unit.roles.get("param") or next(iter(unit.roles.values()))
        return all(name in self.matches for name in _names(main[0]))

    def _coverage(self) -> float:
        units = [u for u in self.target.units if u.kind in WEIGHTED and not (u.index in self.heads and not self._is_matched(u))]
        return sum(self._is_matched(unit) for unit in units) / len(units) if units else float(bool(self.matches))

    def _used(self) -> set[str]:
        return {name for match in self.matches.values() for name in _names(match.source)}

    def _judge(self, coverage: float, source_left_behind: str | None) -> None:
        if self.matching.flags:
            self.doubts.insert(0, self._first_flag())
        if self.hard:
            return
        if not self.matches:
            self.hard.append(f"nothing fits: no layer of the source has a place here{self._first_clash()}")
        elif coverage < self.policy.min_coverage:
            self.hard.append(
                f"coverage {coverage:.0%} of the target's convolution and linear layers is under min_coverage "
                f"{self.policy.min_coverage:.0%}{self._first_clash()}"
            )
        elif source_left_behind:
            self.hard.append(source_left_behind)

    def _first_clash(self) -> str:
        if self.matching.clashes:
            return f"; the first pair that clashes is {self.matching.clashes[0]}"
        if self.matching.flags:
            return f"; {self._first_flag()}"
        missing = next((u for u in self.target.units if u.kind in WEIGHTED and not self._is_matched(u)), None)
        return f"; the first layer without a source is {missing.path} {list(missing.shape)}" if missing else ""

    def _first_flag(self) -> str:
        name, flag = next(iter(self.matching.flags.items()))
        could = f"; could be {', '.join(flag.names[:3])}" if flag.alternatives else ""
        others = len(self.matching.flags) - 1
        more = f" (and {counted(others, 'tensor')} more)" if others else ""
        settle = f"; a map settles it: {flag.line(name)}" if flag.alternatives else ""
        return f"{name} is not decided: {flag.reason}{could}{more}{settle}"

    # --- per tensor ---

    def _outcome(self, entry: Entry) -> Outcome:
        common: dict[str, Any] = {"shape": entry.shape, "parameters": num_elements(entry.shape), "head": entry.name in self.head_names}
        match = self.matches.get(entry.name)
        if match is not None:
            shape = self.source_shapes.get(match.source) if isinstance(match.source, str) else None
            return Outcome(
                entry.name,
                match.source,
                "adapted" if match.transform else "loaded",
                _EVIDENCE.get(match.evidence, match.evidence),
                match.evidence,
                match.transform,
                match.margin,
                source_shape=shape,
                **common,
            )
        if entry.name in self.filled:
            return Outcome(entry.name, None, "filled", self.filled[entry.name], **common)
        flag = self.matching.flags.get(entry.name)
        if flag is not None and not self.hard:
            return Outcome(entry.name, None, "ambiguous", flag.reason, alternatives=flag.names, **common)
        if entry.family != "f" and not entry.is_counter:
            return Outcome(entry.name, None, "kept", "a table of the architecture, not learned", **common)
        reason = "the transfer was refused" if self.hard else self.reasons.get(entry.name) or "no source"
        return Outcome(entry.name, None, "fresh", reason, **common)

    def _unused(self) -> list[Outcome]:
        used = self._used()
        head = {name for unit in detect_heads(self.source_units) for name in unit.names}
        outcomes = []
        for entry in self.source:
            if entry.name in used:
                continue
            if entry.is_counter:
                reason = "a counter with no place here"
            elif self.inside is not None and entry.name not in self.inside:
                reason = "outside of the prefix"
            else:
                reason = "the source's head" if entry.name in head else "no place for it here"
            outcomes.append(_unused_outcome(entry, reason))
        return outcomes + [_unused_outcome(entry, "set aside as asked (ignore)") for entry in self.ignored]


def _unused_outcome(entry: Entry, reason: str) -> Outcome:
    return Outcome(None, entry.name, "unused", reason, source_shape=entry.shape, parameters=num_elements(entry.shape))


_EVIDENCE = {
    "name": "the same name",
    "unique-shape": "the only layer of this shape on both sides",
    "structure": "the same in every near-optimal alignment",
    "tree+number": "the same place in the tree of modules, by content and numbers",
    "pattern": "its last words stand for the same layer in the other blocks",
    "graph": "the same place in the flow of data",
    "order": "the order of registration (assumed)",
    "map": "as the map says",
    "class names": "rows of the same classes",
}


def _names(key: Key) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
