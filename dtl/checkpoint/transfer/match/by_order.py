"""Planning by position: two networks that register the same shapes in the same order, whatever the names."""

from __future__ import annotations

from collections.abc import Sequence

from dtl.checkpoint.transfer.layers.layer import Layer, TensorSpec, detect_heads, layers_of
from dtl.checkpoint.transfer.match.evidence import Clash, Match, Matching


def match_strict_order(source: list[TensorSpec], target: list[TensorSpec], *, heads: Sequence[Layer]) -> Matching:
    """Pair the floating tensors one by one if both sides have the same shapes in the same order.

    Counters (`num_batches_tracked`) and other integers are set aside, and the head of either side or of both may be.
    Where the sequences differ nothing is paired, and the refusal shows the first pair that clashes.
    """
    matching = Matching(view="strict order")
    source_head = {name for layer in detect_heads(layers_of(source)) for name in layer.names}
    target_head = {name for layer in heads for name in layer.names}
    attempts = [
        (_floating(source, without_source), _floating(target, without_target))
        for without_source, without_target in ((set(), set()), (set(), target_head), (source_head, target_head), (source_head, set()))
    ]
    for ours, theirs in attempts:
        if ours and [e.shape for e in ours] == [e.shape for e in theirs]:
            matching.matches = {t.name: Match((s.name,), evidence="order") for s, t in zip(ours, theirs)}
            _counters(matching, source, target)
            return matching
    ours, theirs = attempts[2]
    matching.clashes.append(_first_clash(ours, theirs))
    matching.refusals.append(f"the sequences of shapes differ ({len(ours)} tensors in the source, {len(theirs)} in the network): {matching.clashes[0]}")
    return matching


def _floating(specs: list[TensorSpec], without: set[str]) -> list[TensorSpec]:
    return [spec for spec in specs if spec.family == "f" and spec.name not in without]


def _counters(matching: Matching, source: list[TensorSpec], target: list[TensorSpec]) -> None:
    ours, theirs = ([e for e in side if e.is_counter] for side in (source, target))
    if len(ours) == len(theirs):
        matching.matches.update({t.name: Match((s.name,), evidence="order") for s, t in zip(ours, theirs)})


def _first_clash(ours: list[TensorSpec], theirs: list[TensorSpec]) -> Clash:
    nothing = TensorSpec("(nothing)", ())
    for s, t in zip(ours, theirs):
        if s.shape != t.shape:
            return Clash(t.name, t.shape, s.name, s.shape)
    at = min(len(ours), len(theirs))
    s = ours[at] if at < len(ours) else nothing
    t = theirs[at] if at < len(theirs) else nothing
    return Clash(t.name, t.shape, s.name, s.shape)
