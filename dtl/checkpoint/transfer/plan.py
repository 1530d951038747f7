"""The plan of a transfer: one outcome for every tensor of the target and every unused tensor of the source.

Pure: names and shapes in, a `TransferPlan` out; no tensor is read, nothing is changed. `dtl.checkpoint.transfer.apply` applies it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dtl.checkpoint.transfer.advice import Advice, Attempt, Refusal, message
from dtl.checkpoint.transfer.layers.dataflow import Dataflow, Side, Target, target_of
from dtl.checkpoint.transfer.layers.layer import Key, Layer, TensorSpec, detect_heads, head_layers, layers_of, looks_sorted, rows_in_front, specs_of
from dtl.checkpoint.transfer.match.alignment import first_layer
from dtl.checkpoint.transfer.match.auto import match_auto
from dtl.checkpoint.transfer.match.by_map import Rule, match_map, read_rules
from dtl.checkpoint.transfer.match.by_name import Renaming, Trust, kernels, match_names, rename, renamed_specs, trust_names, with_settled
from dtl.checkpoint.transfer.match.by_order import match_strict_order
from dtl.checkpoint.transfer.match.evidence import Clash, Flag, Match, Matching
from dtl.checkpoint.transfer.outcomes import NO_PLACE, Outcome, set_aside, settle
from dtl.checkpoint.transfer.source.class_names import HeadClasses, read_class_names, read_head_rows
from dtl.checkpoint.transfer.source.read import SourceWeights, in_whole
from dtl.config.models import ImageSize, TransferBy, TransferOptions, arguments_checked
from dtl.errors import UserError
from dtl.text import counted


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would do.

    `outcomes`: one per target tensor, in the target's order, then one per unused source tensor.
    `coverage`: share of the target's layers that get values, each layer, norm, table and scale counted once, not counting a replaced head;
    `source_coverage`: share of the source's layers that are used, not counting its own head and tensors outside of the prefix.
    `refusals`: why the plan must not be applied, most serious first; empty if it may be. `pairs` is empty when the whole transfer is
    refused (coverage, several matching networks, misleading names); it holds the certain pairs when only single tensors are undecided.
    """

    by: str
    view: str
    outcomes: tuple[Outcome, ...]
    coverage: float
    source_coverage: float
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    clashes: tuple[Clash, ...] = ()
    prefix: tuple[str, str] = ("", "")
    source_specs: list[TensorSpec] = field(default_factory=list, repr=False, compare=False)
    """The source's tensors that belong to the network asked for."""
    ties: tuple[str, ...] = ()
    """Second names of tensors that two modules of the target share."""
    head_rows: tuple[tuple[int, ...], ...] | None = None
    """For each class of the target the rows of the source's head that become its row (their mean)."""

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def pairs(self) -> dict[str, str | tuple[str, ...]]:
        """Target tensor -> source tensor (a tuple of them where several are joined), for all that would be loaded."""
        return {o.target: o.source for o in self.outcomes if o.target and o.source and o.outcome in ("loaded", "adapted")}

    @property
    def flagged(self) -> dict[str, tuple[str, ...]]:
        """Undecided target tensor -> source tensors or layers that would fit."""
        return {o.target: o.alternatives for o in self.outcomes if o.target and o.outcome == "ambiguous"}

    @property
    def fresh(self) -> tuple[str, ...]:
        """Target tensors that keep the values they have."""
        return tuple(o.target for o in self.outcomes if o.target and o.outcome in ("fresh", "ambiguous"))

    @property
    def random(self) -> tuple[str, ...]:
        """The tensors besides the head that are learned and keep their initial values."""
        return tuple(o.target for o in self.outcomes if o.target and o.outcome in ("fresh", "ambiguous") and o.is_learned and not o.head)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The source's tensors that are learned, belong to the network that is asked for, and have no place in it; its head aside."""
        return tuple(o.sources[0] for o in self.outcomes if o.outcome == "unused" and o.reason == NO_PLACE and o.is_learned)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What stays random, and what is dropped. Of a plan that is refused as a whole there is nothing to say."""
        random, dropped = (self.random, self.dropped) if self.count("loaded", "adapted") else ((), ())
        if not (random or dropped):
            return ()
        from dtl.checkpoint.transfer.fresh import are_dropped, stay_random

        ours = [name for o in self.outcomes if o.is_learned for name in o.sources]
        theirs = [o.target for o in self.outcomes if o.target and o.is_learned]
        return (*((stay_random(random, theirs),) if random else ()), *((are_dropped(dropped, ours),) if dropped else ()))

    @property
    def digest(self) -> str:
        """SHA-256 of what goes where: ranks compare it."""
        text = json.dumps([[(o.target, o.source, o.outcome, o.transform) for o in self.outcomes], self.head_rows])
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self, *outcomes: str) -> int:
        return sum(o.outcome in outcomes for o in self.outcomes)


def plan_transfer(
    source_tensors: Mapping[str, torch.Tensor],
    model: nn.Module | Mapping[str, torch.Tensor],
    *,
    by: TransferBy = "auto",
    assume_order: bool = False,
    source_model: nn.Module | None = None,
    mapping: Any = None,
    heads: Sequence[str] | None = None,
    keep_head: bool | Literal["rows"] | None = None,
    head_rows: Mapping[str, str | Sequence[str]] | None = None,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
    on_ambiguous: Literal["error", "fresh"] = "error",
    min_coverage: float = 0.6,
    ordered: bool | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    fill: Mapping[str, str] | None = None,
    fold_norms: bool = False,
    image_size: ImageSize | None = None,
    trace: bool = True,
) -> TransferPlan:
    """Plan how `source_tensors` go into `model`, by names and shapes alone.

    `by`: name, order (equal sequences of shapes, else aligned with gaps), strict (equal sequences or nothing), map, or auto (names
    where they can be trusted, then alignment; never a guess).
    `assume_order`: accept pairs that only the order of registration distinguishes. `source_model`: the network the weights
    were made for; with it both execution orders are known. `mapping`: for `by="map"`, a file or a dict
    of rules (`dtl.checkpoint.transfer.match.by_map`); with `by="auto"` its lines decide single layers.
    `heads`: dotted names of the classifier's modules (found when not given). `keep_head`: None loads the head when shapes
    are equal and class lists, where both are known, agree; "rows" picks its rows by class names. `head_rows`: target class ->
    source class, or several whose rows are averaged; all others by their own name.
    `ordered`: whether `source_tensors` are in registration order (guessed from the names when None).
    `prefix`: use only source names that begin with it. `ignore`: patterns (`decoder.*`) of source names to leave out: they are not
    used, and `min_coverage` does not count them. `fresh`: patterns (`blocks.3.*`) of names of `model` that may stay random though loaded
    layers follow; without it that is refused. `fill={"conv_bias": "zero"}`: biases that the source's layers do not
    have are zero, not random. `fold_norms`: a norm of the source that `model` does not have is folded into its convolution.
    `trace=False` skips the run of `model` on the meta device.
    Raises UserError on contradictory arguments; a plan that must not be applied is returned with `refusals`.
    """
    with arguments_checked():
        options = TransferOptions.model_validate(
            {
                "by": by,
                "assume_order": assume_order,
                "on_ambiguous": on_ambiguous,
                "min_coverage": min_coverage,
                "ignore": ignore,
                "fresh": fresh,
                "keep_head": "auto" if keep_head is None else keep_head,
                "head_rows": head_rows,
                "source_classes": source_classes,
                "fill": {} if fill is None else fill,
                "fold_norms": fold_norms,
            }
        )
    target = target_of(model, image_size=image_size, trace=trace)
    classes = HeadClasses(source_classes, target_classes, read_head_rows(head_rows, "head_rows") if head_rows else None)
    return make_plan(
        specs_of(in_whole(dict(source_tensors), "the source")),
        target,
        options,
        classes,
        mapping=mapping,
        heads=heads,
        source_model=source_model,
        ordered=ordered,
        prefix=prefix,
    )


def plan_weights(
    weights: SourceWeights,
    model: nn.Module,
    options: TransferOptions,
    *,
    mapping: Any = None,
    source_model: nn.Module | None = None,
    heads: Sequence[str] | None = None,
    target_classes: str | Path | Sequence[str] | None = None,
    image_size: ImageSize | None = None,
) -> TransferPlan:
    """Plan with what is known of the weights themselves: their order, the chosen prefix, their classes."""
    given = options.source_classes
    classes = HeadClasses(
        source=weights.facts.get("classes") if given is None else read_class_names(given, "source_classes"),
        target=None if target_classes is None else read_class_names(target_classes, "target_classes"),
        rows=None if options.head_rows is None else read_head_rows(options.head_rows, "head_rows"),
    )
    return make_plan(
        specs_of(weights.tensors),
        target_of(model, image_size=image_size),
        options,
        classes,
        mapping=mapping,
        heads=heads,
        source_model=source_model,
        ordered=weights.ordered if weights.sha256 is not None else None,
        prefix=weights.prefix or None,
    )


def make_plan(
    tensors: list[TensorSpec],
    target: Target,
    options: TransferOptions,
    classes: HeadClasses,
    *,
    mapping: Any,
    heads: Sequence[str] | None,
    source_model: nn.Module | None,
    ordered: bool | None,
    prefix: str | None,
) -> TransferPlan:
    """The plan itself, and in its refusals the advice that holds when it is tried."""
    given = _rules(mapping, options.by)
    network = None if source_model is None else target_of(source_model, image_size=_own_size(source_model) or target.image_size)
    in_order = not looks_sorted(tensors) if ordered is None else ordered

    def attempt(options: TransferOptions, rules: list[Rule], names: Mapping[str, str] | None = None) -> tuple[TransferPlan, tuple[Refusal, ...]]:
        source, ignored = set_aside(tensors, options.ignore)
        if names is not None:
            ignored += [spec for spec in source if spec.name not in names]
            source = [spec for spec in source if spec.name in names]
        request = PlanRequest(source, target, options, head_layers(target.layers, heads), rules, in_order, network if names is None else None, prefix)
        return _settled(request, classes, ignored, names)

    def best(options: TransferOptions, rules: list[Rule]) -> tuple[TransferPlan, tuple[Refusal, ...]]:
        """By the file's own names; where that is refused, by a dialect that is known to use such names, if more can be paired then."""
        plan, refusals = attempt(options, rules)
        if refusals and options.by == "auto" and not rules:
            from dtl.checkpoint.transfer.match.dialects import translations

            for translation in translations([spec.name for spec in tensors], [spec.name for spec in target.specs]):
                read, problems = attempt(options, rules, translation.names)
                if not problems or len(read.pairs) > len(plan.pairs):
                    return replace(read, notes=(*read.notes, f"the names are those of {translation.dialect}")), problems
        return plan, refusals

    def again(changed: Mapping[str, Any], lines: Mapping[str, Any]) -> Attempt:
        try:
            added = read_rules(lines) if lines else []
            kept = [rule for rule in given if rule.left not in lines]
            changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}
            tried, refusals = best(options.model_copy(update=changes), [*kept, *added])
        except UserError as error:
            return Attempt((Refusal(str(error)),), {})
        return Attempt(refusals, tried.pairs)

    plan, refusals = best(options, given)
    if options.by == "auto" and network is None:
        assumed = Advice("If both networks register their layers in the same order", {"assume_order": True})
        more = (assumed,) if in_order and not options.assume_order else ()
        known = "; the network that the weights were made for (source_arch) decides more"
        refusals = tuple(replace(each, reason=each.reason + known, advice=(*each.advice, *more)) if each.undecided else each for each in refusals)
    return replace(plan, refusals=tuple(message(each, again) if number < 2 else each.reason for number, each in enumerate(refusals)))


def _own_size(network: nn.Module) -> int | None:
    """Of a network of transformers, which runs at no other size than that of its config."""
    size = getattr(getattr(network, "config", None), "image_size", None)
    return size if isinstance(size, int) else None


def _settled(
    request: PlanRequest, classes: HeadClasses, ignored: Sequence[TensorSpec], names: Mapping[str, str] | None
) -> tuple[TransferPlan, tuple[Refusal, ...]]:
    """Find the pairs, then settle what becomes of each tensor. `names`: those by which the source's tensors are matched, where these are not their own."""
    source, target, options = request.source, request.target, request.options
    found = match(request) if names is None else _translated(request, names)
    lora = [spec.name for spec in source if _LORA.search(spec.name)]
    if lora:
        found.matching.refusals.insert(0, _unmerged(lora, source))
    if options.by != "map":
        _keep_token_positions(found.matching, source, target)
    settled = settle(found.matching, source, target, request.heads, options, classes, inside=found.inside, ignored=ignored)
    plan = TransferPlan(
        by=options.by,
        view=found.matching.view,
        outcomes=settled.outcomes,
        coverage=settled.coverage,
        source_coverage=settled.source_coverage,
        notes=tuple(found.matching.notes),
        clashes=tuple(found.matching.clashes),
        prefix=found.prefix,
        source_specs=[spec for spec in source if found.inside is None or spec.name in found.inside],
        ties=tuple(target.ties),
        head_rows=settled.head_rows,
    )
    if lora:
        alone = Advice("To load the base without them", {"ignore": [*options.ignore, "*lora_*"]})
        return plan, (replace(settled.refusals[0], advice=(alone,)), *settled.refusals[1:])
    return plan, settled.refusals


def _translated(request: PlanRequest, names: Mapping[str, str]) -> Planned:
    """What is matched by other names, in the source's own."""
    found = match(replace(request, source=[replace(spec, name=names[spec.name]) for spec in request.source]))
    own = {now: name for name, now in names.items()}
    inside = None if found.inside is None else frozenset(own[name] for name in found.inside)
    return replace(found, matching=_own_names(found.matching, Renaming(dict(names))), inside=inside)


_LORA = re.compile(r"(^|[._])lora_([AB]|down|up|magnitude_vector|embedding_[AB])([._]|$)")


def _unmerged(lora: Sequence[str], source: Sequence[TensorSpec]) -> str:
    """A weight under LoRA is base + scale * B A, and the scale does not stand in the file."""
    named = f"({counted(len(lora), 'tensor')}, the first is {lora[0]})"
    if len(lora) == len(source):
        return (
            f"the source holds LoRA layers alone {named}, without the weights that they were trained on; give those as source and the folder of the adapter as "
            "adapter (transfer.adapter, --adapter, or adapter= in Python)"
        )
    return (
        f"the source holds LoRA layers that are not merged into the weights {named}; merge them where they were trained (PEFT: model.merge_and_unload()) and "
        "save the result"
    )


def _keep_token_positions(matching: Matching, source: Sequence[TensorSpec], target: Target) -> None:
    """A table without a row for the class token, from one with it (DINOv2 into its variant with registers): the row is added to the token. And back: the
    token had no position, so its row is zero."""
    have, want = ({spec.name: spec.shape for spec in specs} for specs in (source, target.specs))
    grids = {layer.names[0]: layer.grid for layer in target.layers}
    tables = [(name, match) for name, match in matching.matches.items() if match.transform.startswith("resize_position_embedding") and len(want[name]) == 3]
    for name, match in tables:
        places, grid = want[name][1], grids.get(name)
        fronts = rows_in_front(have[match.source[0]][1], 0), rows_in_front(places, 0) if grid is None else places - grid[0] * grid[1]
        tokens = [token for token in matching.matches if token.endswith(("cls_token", "class_token")) and want[token] == (1, 1, want[name][2])]
        if len(tokens) != 1 or matching.matches[tokens[0]].transform or len(matching.matches[tokens[0]].source) != 1:
            continue
        if fronts == (1, 0):
            token = matching.matches[tokens[0]]
            matching.matches[tokens[0]] = replace(token, source=(*token.source, *match.source), transform="add_position")
        elif fronts == (0, 1) and match.transform == "resize_position_embedding":
            matching.matches[name] = replace(match, transform="zero_position")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made of. `rules`: of the user's map. `in_order`: whether the source's sequence can be the order of registration."""

    source: list[TensorSpec]
    target: Target
    options: TransferOptions
    heads: list[Layer]
    rules: list[Rule]
    in_order: bool
    source_model: Target | None = None
    prefix: str | None = None

    def first(self) -> int | None:
        """The target's layer that sees the input."""
        return first_layer(self.target.layers, self.target.dataflow)


@dataclass(frozen=True)
class Planned:
    matching: Matching
    prefix: tuple[str, str]
    inside: frozenset[str] | None = None
    """Source tensors under the prefix; None where there is none and all belong to the network."""


def match(request: PlanRequest) -> Planned:
    """Run the planner that `by` names; the matching uses the source's own names."""
    rules, by = request.rules, request.options.by
    if by == "map":
        chosen = frozenset(spec.name for spec in request.source if spec.name.startswith(request.prefix)) if request.prefix else None
        return Planned(match_map(rules, request.source, request.target.specs), ("", ""), chosen)
    settled = match_map(rules, request.source, request.target.specs) if rules else Matching("map")
    if settled.refusals:
        return Planned(settled, ("", ""))
    if request.source_model is not None:
        return _with_source_model(request, settled)
    renaming = rename(request.source, request.target.specs, prefix=request.prefix)
    channels_last = kernels(request.source, renaming)
    renamed = renamed_specs(request.source, renaming, turned=channels_last)
    if by in ("order", "strict"):
        matching = _by_order(replace(request, source=renamed))
    elif renaming.rivals:
        matching = _rivals(renaming)
    elif by == "name":
        matching = match_names(renamed, request.target.layers, heads=request.heads, first=request.first)
    else:
        matching = _auto(replace(request, source=renamed), None, _renamed(settled, renaming))
        matching.head_rows = settled.head_rows
    if renaming.hits and not renaming.rivals and renaming.source_prefix != renaming.target_prefix:
        matching.notes.append(f"prefix of the names: '{renaming.source_prefix}' in the source, '{renaming.target_prefix}' in this network")
    matching = _own_names(matching, renaming)
    _turn_kernels(matching, channels_last)
    return Planned(matching, (renaming.source_prefix, renaming.target_prefix), renaming.inside)


def _turn_kernels(matching: Matching, channels_last: set[str]) -> None:
    """Kernels planned in torch's layout are turned when applied; what needs a second transform on top is left undecided."""
    for name, found in list(matching.matches.items()):
        if found.source[0] not in channels_last:
            continue
        if found.transform == "stem_channels":
            matching.matches[name] = replace(found, transform="transpose_stem")
        elif found.transform:
            del matching.matches[name]
            matching.flags[name] = Flag(f"a channels-last kernel that would need {found.transform} as well", ((found.source, found.transform),))
        else:
            matching.matches[name] = replace(found, transform="transpose_kernel")


def _rules(mapping: Any, by: str) -> list[Rule]:
    if mapping is None:
        if by == "map":
            raise UserError("by: map needs a map (a YAML or JSON file, or a dict)")
        return []
    if by not in ("map", "auto"):
        raise UserError(f"by: {by} takes no map; use by: map, or by: auto with a map for single layers")
    return read_rules(mapping)


def _renamed(settled: Matching, renaming: Renaming) -> dict[str, Match]:
    """What the user's map settles, in the names that the planner uses for the source."""

    now = renaming.renamed
    return {target: replace(found, source=tuple(now.get(name, name) for name in found.source)) for target, found in settled.matches.items()}


def _auto(request: PlanRequest, source_flow: Dataflow | None, settled: dict[str, Match], *, names: bool = True) -> Matching:
    """Names first; where these leave layers on both sides, the views of structure.

    `settled`: pairs given by the user's map. `names`: whether the names are the source's own and may be used.
    """
    source, target = layers_of(request.source, like=request.target.layers), request.target.layers
    if source_flow is None and not request.in_order and any(layer.flat for layer in source):
        return _nothing_to_go_by()
    if names:
        named = match_names(request.source, target, heads=request.heads, first=request.first)
        trust = trust_names(named, source, target, request.heads)
    else:
        named, trust = Matching("names"), Trust(False, distrusted={layer.index for layer in target}, numbers=False)
    if settled:
        trust = with_settled(trust, settled, source, target)
    used = set(trust.anchors.values())
    apart = {id(layer) for layer in (*request.heads, *detect_heads(source))}
    left = [layer for layer in source if layer.index not in used and id(layer) not in apart]
    complete = not left or all(layer.index in trust.anchors or id(layer) in apart for layer in target)
    # Tracing costs up to a second, so it is done only where something is left to decide.
    flow = None if complete else request.target.dataflow
    matching = match_auto(
        Side(source, source_flow),
        Side(target, flow),
        named=named,
        trust=trust,
        heads=request.heads,
        in_order=request.in_order,
        assume_order=request.options.assume_order,
    )
    matching.matches.update(settled)
    matching.flags = {name: flag for name, flag in matching.flags.items() if name not in settled}
    return matching


def _nothing_to_go_by() -> Matching:
    matching = Matching("nothing")
    matching.refusals.append("the names in the source do not identify layers, and their order is unknown (the names are sorted): write a map (by: map)")
    return matching


def _with_source_model(request: PlanRequest, settled: Matching) -> Planned:
    """Give the source's tensors the names of its own network, whose execution order and dataflow are then known."""
    network = request.source_model
    assert network is not None
    own, has_names = _names_in(request.source, network, request.in_order, request.prefix)
    if own is None:
        raise UserError("source_model: its tensors match those of the source neither by name nor by the sequence of shapes")
    flow = network.dataflow
    if flow is None:
        raise UserError("source_model: it cannot be run on the meta device, so the order of its layers is unknown")
    specs = [TensorSpec(own[e.name], e.shape, e.family) for e in request.source if e.name in own]
    matching = _auto(replace(request, source=specs, source_model=None), flow, _renamed(settled, Renaming(own)), names=has_names)
    matching.head_rows = settled.head_rows
    return Planned(_own_names(matching, Renaming(own)), ("", ""), frozenset(own))


def _names_in(source: list[TensorSpec], network: Target, in_order: bool, prefix: str | None) -> tuple[dict[str, str] | None, bool]:
    """(source tensor -> its name in the network it was made for, whether the source itself has these names).

    By names, else by the whole sequence of shapes; (None, False) where neither fits.
    """
    shapes = {spec.name: spec.shape for spec in network.specs}
    renaming = rename(source, network.specs, prefix=prefix)
    fits = {name: now for name, now in renaming.renamed.items() if now in shapes and name in renaming.inside}
    wrong = [spec for spec in source if spec.name in fits and shapes[fits[spec.name]] != spec.shape]
    learned = [spec for spec in network.specs if not spec.is_counter]
    whole = len(fits) >= 0.9 * len(renaming.inside)
    if not renaming.rivals and not wrong and whole and len(set(fits.values()) & {spec.name for spec in learned}) >= 0.9 * len(learned):
        return fits, True
    from dtl.checkpoint.transfer.match.dialects import translations

    for translation in translations([spec.name for spec in source], list(shapes)):
        if all(shapes.get(translation.names.get(spec.name, "")) == spec.shape for spec in source):  # files of transformers, whose modules have other names
            return translation.names, True
    if not in_order:
        return None, False
    ours = [spec for spec in source if not spec.is_counter]
    head = {name for layer in detect_heads(network.layers) for name in layer.names}
    for theirs in (learned, [spec for spec in learned if spec.name not in head]):
        if [spec.shape for spec in ours] == [spec.shape for spec in theirs]:
            counters = [[spec for spec in side if spec.is_counter] for side in (source, network.specs)]
            both = zip(*counters) if len(counters[0]) == len(counters[1]) else ()
            return {a.name: b.name for a, b in (*zip(ours, theirs), *both)}, False
    return None, False


def _by_order(request: PlanRequest) -> Matching:
    if not request.in_order:
        matching = Matching(view="order")
        matching.refusals.append(
            f"by: {request.options.by} needs the order in which the network registered its tensors, but the names of this source are sorted "
            "(safetensors keeps no order); use by: name, auto or map"
        )
        return matching
    strict = match_strict_order(request.source, request.target.specs, heads=request.heads)
    if not strict.refusals or request.options.by == "strict":
        return strict
    # Not the same sequence: align the layers, with gaps, by position alone.
    aligned = _auto(replace(request, options=request.options.model_copy(update={"assume_order": True})), None, {}, names=False)
    if not aligned.matches:
        aligned.clashes = strict.clashes
    aligned.notes += strict.refusals
    return aligned


def _rivals(renaming: Renaming) -> Matching:
    matching = Matching(view="names")
    prefixes = (renaming.source_prefix, *renaming.rivals)
    named, choices = ", ".join(f"'{prefix}'" for prefix in prefixes), " or ".join(f"source: FILE#{prefix}" for prefix in prefixes)
    matching.refusals.append(f"the source contains several networks that fit equally well, with the prefixes {named}; choose one: {choices}")
    return matching


def _own_names(matching: Matching, renaming: Renaming) -> Matching:
    """Back from the target's terms to the names in the source."""
    own = {now: name for name, now in renaming.renamed.items()}

    def back(key: Key) -> Key:
        return tuple(own.get(name, name) for name in key)

    matching.matches = {name: replace(found, source=back(found.source)) for name, found in matching.matches.items()}
    matching.flags = {name: replace(flag, alternatives=tuple((back(key), how) for key, how in flag.alternatives)) for name, flag in matching.flags.items()}
    matching.clashes = [replace(clash, source=own.get(clash.source, clash.source)) for clash in matching.clashes]
    return matching


def names_in_network(source: list[TensorSpec], network: nn.Module) -> dict[str, str]:
    """Source tensor -> its name in the network it was made for; UserError where neither names nor shapes match."""
    own, _ = _names_in(source, target_of(network, trace=False), not looks_sorted(source), None)
    if own is None:
        raise UserError("source_model: its tensors match those of the source neither by name nor by the sequence of shapes")
    return own
