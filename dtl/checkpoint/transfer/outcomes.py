"""From a matching to outcomes: what happens to each tensor, and whether the whole may be applied.

The rules that hold whatever planner made the matching: the head, layers never half loaded, norms never beside another
convolution, coverage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from dtl.checkpoint.transfer.advice import Advice, Refusal, under
from dtl.checkpoint.transfer.layers.dataflow import Target, links_by_dataflow, links_by_neighbours
from dtl.checkpoint.transfer.layers.layer import NORMS, WEIGHTED, Key, Layer, Shape, TensorSpec, detect_heads, layers_of, num_elements
from dtl.checkpoint.transfer.match.evidence import NEW_NAME, Flag, Match, Matching, fold_orphans
from dtl.checkpoint.transfer.source.class_names import HeadClasses, rows_of_head
from dtl.config.models import TransferOptions
from dtl.errors import UserError
from dtl.text import counted, some


@dataclass(frozen=True)
class Outcome:
    """What becomes of one tensor.

    `outcome`: loaded (copied), adapted (through `transform`), filled (a value that is known without the source), kept (an
    integer buffer of the architecture), fresh (keeps its initial value), ambiguous (undecided: keeps its initial value), unused (a source
    tensor that is not loaded; `target` is None then). `parameters` is its number of elements.
    """

    target: str | None
    sources: Key
    """The source tensors that it is made of: nearly always one, none for what is not loaded."""
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
    is_learned: bool = True
    """False for integers (counters, indices), masks, and tensors without elements."""

    @property
    def source(self) -> str | tuple[str, ...] | None:
        """The name of the source tensor; a tuple of names where several are joined."""
        return self.sources if len(self.sources) > 1 else self.sources[0] if self.sources else None


@dataclass(frozen=True)
class Settled:
    outcomes: tuple[Outcome, ...]
    coverage: float
    source_coverage: float
    refusals: tuple[Refusal, ...]
    head_rows: tuple[tuple[int, ...], ...] | None = None


def settle(
    matching: Matching,
    source: list[TensorSpec],
    target: Target,
    heads: Sequence[Layer],
    options: TransferOptions,
    classes: HeadClasses,
    *,
    inside: Collection[str] | None = None,
    ignored: Sequence[TensorSpec] = (),
) -> Settled:
    """`inside`: the source's tensors that belong to the network asked for (None: all). `ignored`: those set aside before."""
    return _Settlement(matching, source, target, heads, options, classes, inside, ignored).run()


class _Settlement:
    def __init__(
        self,
        matching: Matching,
        source: list[TensorSpec],
        target: Target,
        heads: Sequence[Layer],
        options: TransferOptions,
        classes: HeadClasses,
        inside: Collection[str] | None,
        ignored: Sequence[TensorSpec],
    ) -> None:
        self.matching, self.source, self.target, self.options = matching, source, target, options
        self.classes, self.inside, self.ignored = classes, inside, ignored
        self.heads = {layer.index for layer in heads}
        self.head_names = {name for layer in heads for name in layer.names}
        self.matches = dict(matching.matches)
        self.source_shapes = {spec.name: spec.shape for spec in source}
        self.target_specs = {spec.name: spec for spec in target.specs}
        self.source_layers = layers_of(source, like=target.layers)
        self.reasons: dict[str, str] = {}
        clashed = {clash.target: clash for clash in matching.clashes}
        for layer in target.layers:
            for clash in (clashed[name] for name in layer.names if name in clashed):
                self.reasons.update(dict.fromkeys(layer.names, f"same name, different shape: {clash}"))
        self.head_rows = matching.head_rows
        self.filled: dict[str, str] = {}
        self.may_be_new = self._may_be_new()
        self.norms: set[int] = set()
        """Norms that must not stay random beside loaded layers; `on_ambiguous: fresh` allows it."""
        self.random: Refusal | None = None
        self.doubts: list[Refusal] = []
        self.hard = [Refusal(reason) for reason in matching.refusals]

    def run(self) -> Settled:
        self._other_norms()
        self._ties()  # before layers are judged by their weights, and again for what was dropped then
        for layer in self.target.layers:
            if layer.index in self.heads:
                self._head(layer)
            elif layer.kind in WEIGHTED:
                self._weighted(layer)
            elif layer.kind == "bn":
                self._batch_norm(layer)
        if self.options.fold_norms:
            self._fold()
        self._ties()
        self._norms_of_fresh_layers()
        self._lonely_norms()
        self._random_layers()
        coverage, used = self._coverage(), self._used()
        heads = [layer for layer in self.target.layers if layer.index in self.heads]
        counted = source_layers_that_count(self.source_layers, used, self.inside, heads)
        used_share = source_coverage(counted, used)
        self._judge(self._coverage(WEIGHTED), why_too_little_is_used(counted, used, self.options.min_coverage, self.options.ignore))
        outcomes = [self._outcome(spec) for spec in self.target.specs] + self._unused()
        if not self.hard and not any(o.outcome in ("loaded", "adapted") for o in outcomes):
            self.hard.append(Refusal("nothing would be loaded"))
        return Settled(tuple(outcomes), coverage, used_share, tuple(self.hard or self.doubts), self.head_rows)

    def _may_be_new(self) -> frozenset[str]:
        """What the option `fresh` names is new where it is in doubt, and no reason to refuse."""
        if not self.options.fresh:
            return frozenset()
        from dtl.checkpoint.transfer.fresh import may_be_new

        names = may_be_new(self.options.fresh, [spec.name for spec in self.target.specs])
        for name in names & self.matching.flags.keys():
            self.reasons[name] = f"new (fresh); {self.matching.flags.pop(name).reason}"
        return names

    # --- single layers ---

    def _other_norms(self) -> None:
        """A norm whose namesake is of another kind stays undecided, but there is nothing to choose."""
        for layer in self.target.layers:
            flags = [flag for name in layer.names if (flag := self.matching.flags.get(name)) and not flag.alternatives]
            if layer.kind in NORMS and flags:
                self._drop(layer, flags[0].reason)
                self.norms.add(layer.index)

    def _drop(self, layer: Layer, reason: str) -> None:
        for name in layer.names:
            self.matches.pop(name, None)
            self.reasons[name] = reason

    def _head(self, layer: Layer) -> None:
        why = head_obstacle(layer, self.matches, self.source_layers, self.classes, self.options.keep_head)
        if self.options.keep_head == "rows" and (why or self.classes.rows):
            chosen = rows_of_head(layer, self.source_layers, self.classes)
            why = chosen if isinstance(chosen, str) else ""
            if not isinstance(chosen, str):
                self.matches.update(chosen[0])
                self.head_rows = chosen[1]
        if not why:
            return
        self._drop(layer, f"head: {why}")
        for name in layer.names:
            self.matching.flags.pop(name, None)
        if self.options.keep_head in (True, "rows"):
            self.hard.append(Refusal(f"the head {layer.path} cannot be loaded, but keep_head requires it: {why}"))

    def _weighted(self, layer: Layer) -> None:
        weight = layer.roles.get("weight")
        if weight is None:
            return
        have = all(name in self.matches for name in weight[0])
        for role, (key, _) in layer.roles.items():
            if role != "bias":
                continue
            for name in key:
                if not have and name in self.matches:
                    del self.matches[name]
                    self.reasons[name] = "the layer's weight has no source"
                elif have and name not in self.matches:
                    self._bias_without_source(name)

    def _bias_without_source(self, name: str) -> None:
        if self.options.fill.conv_bias == "zero":
            self.filled[name] = "zero: the source's layer has no bias"
        else:
            self.reasons[name] = "the source has no bias for it (fill: {conv_bias: zero} sets it to zero, as if the layer had none)"

    def _batch_norm(self, layer: Layer) -> None:
        wanted = [layer.roles[role][0][0] for role in layer.roles if role != "num_batches_tracked"]
        found = [name for name in wanted if name in self.matches]
        counter = layer.roles.get("num_batches_tracked")
        if not found:
            self._drop(layer, self.reasons.get(layer.names[0], "")) if counter else None
            return
        if len(found) < len(wanted):
            missing = next(name for name in wanted if name not in self.matches)
            self._drop(layer, f"the source has {found[0]} but not {missing}; a norm without its statistics is not loaded")
            self.norms.add(layer.index)
            return
        if counter is not None and counter[0][0] not in self.matches:
            self.filled[counter[0][0]] = "zero: the source has no num_batches_tracked"

    def _fold(self) -> None:
        folded = fold_orphans(self.matches, self.source_layers, self.target)
        self.matches.update(folded)
        for name in folded:
            self.filled.pop(name, None)

    # --- the whole ---

    def _ties(self) -> None:
        for name, first in self.target.ties.items():
            if name in self.matches and first in self.matches:
                continue  # the source has a tensor for each; their values are compared before they are loaded
            if first in self.matches:
                self.matches[name] = self.matches[first]
            elif name in self.matches:
                self.matches[first] = self.matches[name]

    def _norms_of_fresh_layers(self) -> None:
        """Statistics of another layer's outputs are worse than none: a norm behind a layer without a source is newly initialised too."""
        loose = [u for u in self.target.layers if u.kind in WEIGHTED and u.index not in self.heads and not self._is_matched(u)]
        if not loose:
            return
        flow = self.target.dataflow
        links = links_by_dataflow(self.target.layers, flow) if flow else links_by_neighbours(self.target.layers)
        fresh = {layer.index: layer for layer in loose}
        for layer in self.target.layers:
            if layer.kind not in NORMS or not self._is_matched(layer) or self._by_map(layer):
                continue
            before = [other for side, other in links.get(layer.index, ()) if side == "post"]
            if len(before) == 1 and before[0] in fresh:
                self._drop(layer, f"the layer before it, {fresh[before[0]].path}, has no source")
                for name in layer.names:
                    self.filled.pop(name, None)

    def _by_map(self, layer: Layer) -> bool:
        return any(name in self.matches and self.matches[name].evidence == "map" for name in layer.names)

    def _lonely_norms(self) -> None:
        flow = self.target.dataflow if self._any_fresh_norm() else None
        links = links_by_dataflow(self.target.layers, flow) if flow else links_by_neighbours(self.target.layers)
        by_index = {layer.index: layer for layer in self.target.layers}
        for layer in self.target.layers:
            if layer.kind not in NORMS or self._is_matched(layer):
                continue
            beside = [other for side, other in sorted(links.get(layer.index, ())) if side == "post" and self._is_matched(by_index[other])]
            if beside and not any(name in self.matching.flags for name in layer.names):
                why = f"is newly initialised, but {by_index[beside[0]].path} before it is loaded: the source has no norm for it"
                self.norms.add(layer.index)
                for name in layer.names:
                    self.reasons.setdefault(name, why)

    def _random_layers(self) -> None:
        """Layers that would stay random in front of loaded ones, and norms that would beside them, unless `fresh` names them."""
        left = [layer for layer in self.target.layers if self._stays_random(layer)]
        if not left or self.hard:
            return
        from dtl.checkpoint.transfer.fresh import loaded_behind, random_and_followed

        loaded = {layer.index for layer in self.target.layers if self._is_matched(layer)}
        behind = loaded_behind(self.target, left, loaded)
        bad = [layer for layer in left if layer.index in behind or layer.index in self.norms]
        if not bad:
            return
        first, after = bad[0], behind.get(bad[0].index)
        why = self.reasons.get(first.names[0]) or "has no source"
        example = f"{first.path}: {why}" + ("" if after is None else f"; {self.target.layers[after].path} behind it is loaded")
        names = [name for layer in bad for name in layer.names if self._is_random(name)]
        every = [spec.name for spec in self.target.specs if spec.family == "f" and spec.name not in self.filled]
        self.random = random_and_followed(names, every, example, self.options.fresh)

    def _stays_random(self, layer: Layer) -> bool:
        if layer.kind == "buffer" or layer.index in self.heads or self._is_matched(layer):
            return False
        if self.options.on_ambiguous == "fresh" and (layer.index in self.norms or any(name in self.matching.flags for name in layer.names)):
            return False
        return any(self._is_random(name) for name in layer.names)

    def _is_random(self, name: str) -> bool:
        """Whether a tensor is learned, without a value, and neither in doubt nor allowed to be new."""
        spec = self.target_specs[name]
        flag = self.matching.flags.get(name)
        open_still = name in self.matches or name in self.filled or name in self.may_be_new or (flag is not None and flag.alternatives)
        return spec.family == "f" and num_elements(spec.shape) > 0 and not open_still

    def _any_fresh_norm(self) -> bool:
        return any(layer.kind in NORMS and not self._is_matched(layer) for layer in self.target.layers)

    def _is_matched(self, layer: Layer) -> bool:
        main = layer.roles.get("weight") or layer.roles.get("param") or next(iter(layer.roles.values()))
        return all(name in self.matches for name in main[0])

    def _coverage(self, kinds: Collection[str] | None = None) -> float:
        """Of the layers of these kinds (None: of all that learn), each counted once and by the share of its tensors that get a value."""
        layers = [u for u in self.target.layers if u.kind != "buffer" and (kinds is None or u.kind in kinds)]
        layers = [u for u in layers if u.index not in self.heads or self._is_matched(u)]
        shares = [self._is_matched(layer) if kinds is not None else self._share(layer) for layer in layers]
        return sum(shares) / len(shares) if shares else float(bool(self.matches))

    def _share(self, layer: Layer) -> float:
        learned = [name for name in layer.names if self.target_specs[name].family == "f"]
        return sum(name in self.matches or name in self.filled for name in learned) / len(learned) if learned else 1.0

    def _used(self) -> set[str]:
        return {name for match in self.matches.values() for name in match.source}

    def _judge(self, coverage: float, source_left_behind: Refusal | None) -> None:
        if self.options.on_ambiguous == "error" and self._open_flags():
            self.doubts.append(self._first_flag())
        if self.random is not None:
            self.doubts.append(self.random)
        if self.hard:
            return
        if not self.matches:
            self._refuse("nothing matches: no layer of this network has a certain match in the source")
        elif coverage < self.options.min_coverage:
            share, least = under(coverage, self.options.min_coverage)
            self._refuse(f"coverage {share} of the target's convolution and linear layers is below min_coverage {least}")
        elif source_left_behind:
            self.hard.append(source_left_behind)

    def _refuse(self, reason: str) -> None:
        """With the first of what went wrong, and what is said about that."""
        if self.matching.clashes:
            self.hard.append(Refusal(f"{reason}; the first mismatch is {self.matching.clashes[0]}"))
        elif self._open_flags():
            flag = self._first_flag()
            self.hard.append(replace(flag, reason=f"{reason}; {flag.reason}"))
        else:
            missing = next((u for u in self.target.layers if u.kind in WEIGHTED and not self._is_matched(u)), None)
            self.hard.append(Refusal(reason + (f"; the first layer without a source is {missing.path} {list(missing.shape)}" if missing else "")))

    def _open_flags(self) -> dict[str, Flag]:
        """What is undecided, but for norms that have nothing to choose."""
        nothing = {name for layer in self.target.layers if layer.index in self.norms for name in layer.names}
        return {name: flag for name, flag in self.matching.flags.items() if flag.alternatives or name not in nothing}

    def _first_flag(self) -> Refusal:
        flags = self._open_flags()
        name, flag = next(iter(flags.items()))
        could = f"; could be {some(flag.names, limit=3)}" if flag.alternatives else ""
        more = f", together with {counted(len(flags) - 1, 'other tensor')}" if len(flags) > 1 else ""
        advice = [Advice("If it is the same layer", line=flag.line(name, number)) for number in range(min(3, len(flag.alternatives)))]
        if flag.reason == NEW_NAME:
            advice.append(self._new_layers(flags))
        return Refusal(f"{name} is undecided{more}: {flag.reason}{could}", tuple(advice), undecided=True)

    def _new_layers(self, flags: Mapping[str, Flag]) -> Advice:
        from dtl.checkpoint.transfer.fresh import as_patterns

        patterns = as_patterns([name for name, flag in flags.items() if flag.reason == NEW_NAME], [spec.name for spec in self.target.specs])
        return Advice("If it is a new layer", {"fresh": [*self.options.fresh, *patterns]})

    # --- per tensor ---

    def _outcome(self, spec: TensorSpec) -> Outcome:
        common: dict[str, Any] = {
            "shape": spec.shape,
            "parameters": num_elements(spec.shape),
            "head": spec.name in self.head_names,
            "is_learned": spec.family == "f" and num_elements(spec.shape) > 0,
        }
        match = self.matches.get(spec.name)
        if match is not None and self.hard:
            reason = f"{REFUSED}: {_EVIDENCE.get(match.evidence, match.evidence)}"
            return Outcome(spec.name, (), "fresh", reason, transform=match.transform, alternatives=(" + ".join(match.source),), **common)
        if match is not None:
            shape = self.source_shapes.get(match.source[0]) if len(match.source) == 1 else None
            return Outcome(
                spec.name,
                match.source,
                "adapted" if match.transform else "loaded",
                _EVIDENCE.get(match.evidence, match.evidence),
                match.evidence,
                match.transform,
                match.margin,
                source_shape=shape,
                **common,
            )
        if spec.name in self.filled and not self.hard:
            return Outcome(spec.name, (), "filled", self.filled[spec.name], **common)
        flag = self.matching.flags.get(spec.name)
        if flag is not None:
            return Outcome(spec.name, (), "ambiguous", flag.reason, alternatives=flag.names, **common)
        if spec.family != "f" and not spec.is_counter:
            return Outcome(spec.name, (), "kept", "a buffer that the architecture computes, not learned", **common)
        reason = self.reasons.get(spec.name) or "no source"
        return Outcome(spec.name, (), "fresh", reason, **common)

    def _unused(self) -> list[Outcome]:
        used = set() if self.hard else self._used()
        head = {name for layer in detect_heads(self.source_layers) for name in layer.names}
        outcomes, candidates = [], self._used()
        for spec in self.source:
            if spec.name in used:
                continue
            if spec.is_counter:
                reason = "a counter that this network does not have"
            elif self.inside is not None and spec.name not in self.inside:
                reason = "outside of the prefix"
            elif self.hard and spec.name in candidates:
                reason = REFUSED
            else:
                reason = "the source's head" if spec.name in head else NO_PLACE
            outcomes.append(_unused_outcome(spec, reason))
        return outcomes + [_unused_outcome(spec, "left out (ignore)") for spec in self.ignored]


def _unused_outcome(spec: TensorSpec, reason: str) -> Outcome:
    size = num_elements(spec.shape)
    return Outcome(None, (spec.name,), "unused", reason, source_shape=spec.shape, parameters=size, is_learned=spec.family == "f" and size > 0)


NO_PLACE = "no matching layer in this network"
REFUSED = "not loaded, because the transfer was refused"


_EVIDENCE = {
    "name": "the same name",
    "unique-shape": "the only layer of this shape on both sides",
    "structure": "the same in every near-optimal alignment",
    "tree+number": "the same place in the module tree, by content and numbers",
    "pattern": "the end of its name means the same layer in the other blocks",
    "graph": "the same place in the data flow",
    "order": "the order of registration (assumed)",
    "map": "given by the map",
    "class names": "rows of the same classes",
}


def set_aside(source: Sequence[TensorSpec], ignore: Sequence[str]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """(tensors to transfer, tensors whose names fit a pattern of `ignore`). UserError on a pattern without a hit."""
    for pattern in ignore:
        if not any(fnmatchcase(spec.name, pattern) for spec in source):
            names = ", ".join(spec.name for spec in source[:3])
            raise UserError(f"ignore: {pattern} matches no tensor of the source (its names look like {names} ...)")
    aside = {spec.name for spec in source if any(fnmatchcase(spec.name, pattern) for pattern in ignore)}
    return [spec for spec in source if spec.name not in aside], [spec for spec in source if spec.name in aside]


def source_layers_that_count(layers: Sequence[Layer], used: Collection[str], inside: Collection[str] | None, heads_here: Sequence[Layer]) -> list[Layer]:
    """The source's convolution and linear layers that a transfer of this network should use. `heads_here`: the target's heads, whose
    namesakes in the source are its heads, wherever they are registered."""
    heads = {layer.index for layer in (*detect_heads(layers), *(layer for layer in layers if any(_is_namesake(layer, head) for head in heads_here)))}
    weighted = [layer for layer in layers if layer.kind in WEIGHTED and (inside is None or any(name in inside for name in layer.names))]
    return [layer for layer in weighted if layer.index not in heads or _is_used(layer, used)]


def _is_namesake(layer: Layer, head: Layer) -> bool:
    return (layer.path == head.path or layer.path.endswith("." + head.path)) and layer.shape[1:] == head.shape[1:]


def source_coverage(layers: Sequence[Layer], used: Collection[str]) -> float:
    """Share of these layers of which anything is used."""
    return sum(_is_used(layer, used) for layer in layers) / len(layers) if layers else float(bool(used))


def why_too_little_is_used(layers: Sequence[Layer], used: Collection[str], least: float, ignore: Sequence[str] = ()) -> Refusal | None:
    """The refusal of a transfer that leaves most of the source behind, with the one option that accepts it."""
    share = source_coverage(layers, used)
    if share >= least:
        return None
    left = [layer for layer in layers if not _is_used(layer, used)]
    if not left:
        return Refusal("the source holds no convolution or linear layer that could be loaded: it is no network's weights, or other tensors of it")
    shown, bound = under(share, least)
    return Refusal(
        f"coverage {shown} of the source's convolution and linear layers is below min_coverage {bound}: the source is another or a "
        f"larger network; the first of its layers that would not be used is {left[0].path} {list(left[0].shape)}",
        (Advice("To load it anyway", _accepting(layers, used, least, share, ignore)),),
    )


def _accepting(layers: Sequence[Layer], used: Collection[str], least: float, share: float, ignore: Sequence[str]) -> dict[str, Any]:
    """`ignore` where whole parts of the source go unused (a decoder, a second network), else the lower threshold."""
    parts: dict[str, list[Layer]] = {}
    for layer in layers:
        parts.setdefault(layer.path.partition(".")[0], []).append(layer)
    unused = [part for part, members in parts.items() if not any(_is_used(layer, used) for layer in members)]
    rest = [layer for part, members in parts.items() if part not in unused for layer in members]
    if 0 < len(unused) <= 4 and rest and source_coverage(rest, used) >= least:
        return {"ignore": [*ignore, *(f"{part}.*" for part in unused)]}
    return {"min_coverage": int(100 * share) / 100}


def _is_used(layer: Layer, used: Collection[str]) -> bool:
    return any(name in used for name in layer.names)


def head_obstacle(
    layer: Layer,
    matches: Mapping[str, Match],
    source: Sequence[Layer],
    classes: HeadClasses,
    keep_head: bool | Literal["auto", "rows"],
) -> str:
    """Why the target's head `layer` is not loaded as it was matched; "" where it is."""
    if keep_head is False:
        return "not loaded (keep_head: false)"
    found = [matches.get(name) for name in layer.names]
    heads = detect_heads(source)
    other = f"{layer.shape[0]} outputs here, {heads[0].shape[0] if heads else 'none'} in the source"
    if not all(found):
        if not heads:
            return "the source has no head"
        return "no tensor of the source matches it" if heads[0].shape[0] == layer.shape[0] else other
    if all(match is not None and match.transform == "rows" for match in found):
        return ""  # a map that chooses rows has chosen
    if any(match is not None and match.transform not in ("", "squeeze", "reshape_kernel", "transpose_kernel") for match in found):
        return other
    theirs, ours = classes.source, classes.target
    if keep_head == "auto" and ours is not None and theirs is not None and list(ours) != list(theirs):
        return "the class names differ"
    return ""
