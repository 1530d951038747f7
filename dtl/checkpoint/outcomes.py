"""From a matching to outcomes: what happens to each tensor, and whether the whole may be applied.

The rules that hold whatever planner made the matching: the head, layers never half loaded, norms never beside a foreign
convolution, coverage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dtl.checkpoint.attach import links_by_dataflow, links_by_neighbours
from dtl.checkpoint.folding import fold_orphans
from dtl.checkpoint.heads import detect_heads, pick_rows
from dtl.checkpoint.matching import Match, Matching
from dtl.checkpoint.target import Target
from dtl.checkpoint.units import NORMS, WEIGHTED, Entry, Key, Shape, Unit, num_elements, units_of
from dtl.errors import UserError

STATISTICS = ("running_mean", "running_var")


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


def settle(matching: Matching, source: list[Entry], target: Target, heads: Sequence[Unit], policy: Policy) -> Settled:
    return _Settlement(matching, source, target, heads, policy).run()


class _Settlement:
    def __init__(self, matching: Matching, source: list[Entry], target: Target, heads: Sequence[Unit], policy: Policy) -> None:
        self.matching, self.source, self.target, self.policy = matching, source, target, policy
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
        self.head_rows: tuple[tuple[int, ...], ...] | None = None
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
        coverage, source_coverage = self._coverage(), self._source_coverage()
        self._judge(coverage)
        if self.hard:
            self.matches, self.filled = {}, {}
        outcomes = [self._outcome(entry) for entry in self.target.entries] + self._unused()
        if not self.hard and not any(o.outcome in ("loaded", "adapted") for o in outcomes):
            self.hard.append("nothing would be loaded")
        doubts = self.doubts if self.policy.on_ambiguous == "error" else []
        return Settled(tuple(outcomes), coverage, source_coverage, tuple(self.hard or doubts), self.head_rows)

    # --- single layers ---

    def _drop(self, unit: Unit, reason: str) -> None:
        for name in unit.names:
            self.matches.pop(name, None)
            self.reasons[name] = reason

    def _head(self, unit: Unit) -> None:
        why = self._head_obstacle(unit)
        if self.policy.keep_head == "rows" and (why or self.policy.head_rows):
            why = self._rows_of_head(unit)
        if not why:
            return
        self._drop(unit, f"head: {why}")
        for name in unit.names:
            self.matching.flags.pop(name, None)
        if self.policy.keep_head in (True, "rows"):
            self.hard.append(f"keep_head was asked for, but {unit.path} cannot be kept: {why}")

    def _head_obstacle(self, unit: Unit) -> str:
        if self.policy.keep_head is False:
            return "left fresh as asked (keep_head: false)"
        found = [self.matches.get(name) for name in unit.names]
        if not all(found):
            outputs = self._source_outputs()
            if outputs is None:
                return "the source has none"
            return "no part of the source belongs here" if outputs == unit.shape[0] else f"{unit.shape[0]} outputs here, {outputs} in the source"
        if any(match is not None and match.transform not in ("", "squeeze", "reshape_kernel", "transpose_kernel") for match in found):
            return f"{unit.shape[0]} outputs here, {self._source_outputs()} in the source"
        ours, theirs = self.policy.target_classes, self.policy.source_classes
        if self.policy.keep_head is None and ours is not None and theirs is not None and list(ours) != list(theirs):
            return "the classes are others"
        return ""

    def _source_outputs(self) -> int | None:
        found = detect_heads(self.source_units)
        return found[0].shape[0] if found else None

    def _rows_of_head(self, unit: Unit) -> str:
        """Rows of the source's head by class names; "" when that can be done."""
        ours, theirs = self.policy.target_classes, self.policy.source_classes
        if ours is None or theirs is None:
            return "the class names of both sides must be known to choose rows"
        heads = [u for u in detect_heads(self.source_units) if u.shape[0] == len(theirs) and u.shape[1:] == unit.shape[1:]]
        if not heads or unit.shape[0] != len(ours):
            return f"the source has no head of {len(theirs)} outputs and {unit.shape[1:]} inputs"
        try:
            self.head_rows = pick_rows(theirs, ours, self.policy.head_rows)
        except UserError as error:
            return str(error)
        for role, (name, _) in unit.roles.items():
            if role in heads[0].roles and isinstance(name, str):
                self.matches[name] = Match(heads[0].roles[role][0], "rows", "class names")
        return ""

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

    def _source_coverage(self) -> float:
        used = self._used()
        apart = {unit.index for unit in detect_heads(self.source_units)}
        units = [u for u in self.source_units if u.kind in WEIGHTED]
        units = [u for u in units if u.index not in apart or any(name in used for name in u.names)]
        return sum(any(name in used for name in unit.names) for unit in units) / len(units) if units else float(bool(used))

    def _used(self) -> set[str]:
        return {name for match in self.matches.values() for name in _names(match.source)}

    def _judge(self, coverage: float) -> None:
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

    def _first_clash(self) -> str:
        if self.matching.clashes:
            return f"; the first pair that clashes is {self.matching.clashes[0]}"
        if self.matching.flags:
            return f"; {self._first_flag()}"
        missing = next((u for u in self.target.units if u.kind in WEIGHTED and not self._is_matched(u)), None)
        return f"; the first layer without a source is {missing.path} {list(missing.shape)}" if missing else ""

    def _first_flag(self) -> str:
        name, flag = next(iter(self.matching.flags.items()))
        could = f"; could be {', '.join(flag.alternatives[:3])}" if flag.alternatives else ""
        others = len(self.matching.flags) - 1
        more = f" (and {others} tensors more)" if others else ""
        settle = f"; a map settles it: {name}: {flag.alternatives[0]}" if flag.alternatives else ""
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
            return Outcome(entry.name, None, "ambiguous", flag.reason, alternatives=flag.alternatives, **common)
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
            else:
                reason = "the source's head" if entry.name in head else "no place for it here"
            outcomes.append(Outcome(None, entry.name, "unused", reason, source_shape=entry.shape, parameters=num_elements(entry.shape)))
        return outcomes


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
