"""Candidates for each target layer, from aligning the two networks in several orders.

A view is a pair of sequences: the source as registered (or as executed, when its network is known) against the target as
registered or as executed. A candidate is a source layer that some near-optimal alignment of a best view pairs with the target
layer; what has exactly one candidate, both ways, and is skipped by no such alignment, is certain within its view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtl.checkpoint.transfer.layers.dataflow import Candidates, Dataflow, Link
from dtl.checkpoint.transfer.layers.layer import (
    IMAGE_CHANNELS,
    NORMS,
    WEIGHTED,
    Layer,
    distances_transform,
    num_elements,
    position_transform,
    relative_transform,
    squeezed,
)

TAU = 0.75
"""Alignments within this of the best count as equally good: less than a skipped layer costs."""

ANCHOR = 4.0
_FULL = {"conv": 2.0, "linear": 2.0, "buffer": 0.5}


@dataclass
class Viewed:
    """The outcome of all views. `transforms`: (source, target) -> what makes them fit. `name` tells which views were best."""

    name: str
    candidates: Candidates
    margins: dict[tuple[int, int], float]
    transforms: dict[tuple[int, int], str] = field(default_factory=dict)
    sole: frozenset[tuple[int, int]] = frozenset()
    """(source, target) of pairs where either fits nothing else, whatever the order."""


def in_use_order(layers: Sequence[Layer], flow: Dataflow) -> list[Layer]:
    """Layers by first use; one that is never used stays behind its predecessor in registration order."""
    position = {name: at for at, name in enumerate(flow.order)}
    ranks = []
    last = -1.0
    for layer in layers:
        used = [position[name] for name in layer.names if name in position]
        last = min(used) if used else last + 1e-3
        ranks.append((last, layer.index, layer))
    return [layer for _, _, layer in sorted(ranks, key=lambda rank: rank[:2])]


def fit(source: Layer, target: Layer, ends: tuple[bool, bool, bool, bool]) -> tuple[float, str] | None:
    """(score, transform) of a pair, or None. `ends`: is first weighted of source, of target; is last linear of source, of target."""
    first = ends[0] and ends[1]
    have, want = source.shape, target.shape
    kinds = {source.kind, target.kind}
    if source.kind == target.kind and have == want:
        same_bias = ("bias" in source.roles) == ("bias" in target.roles)
        return _FULL.get(source.kind, 1.0) + 0.1 * same_bias * (source.kind != "buffer"), ""
    if "buffer" in kinds or kinds & set(NORMS):
        return None
    if kinds <= set(WEIGHTED):
        return _fit_weighted(source, target, first=first, last=ends[2] and ends[3])
    if kinds <= {"param", "vector"}:
        if squeezed(have) == squeezed(want) and squeezed(have):
            return 0.9, "squeeze"
        if min(have[1:2] + want[1:2], default=0) > 4 and (how := position_transform(have, want, target.grid)):
            return 0.7, how
        if "relative" in target.path and (how := relative_transform(have, want, target.grid)):
            return 0.7, how
        if "attention_biases" in target.path and (how := distances_transform(have, want, target.grid)):
            return 0.7, how
    return None


def _fit_weighted(source: Layer, target: Layer, *, first: bool, last: bool) -> tuple[float, str] | None:
    have, want = source.shape, target.shape
    if source.kind != target.kind:
        if squeezed(have) == squeezed(want) and len(squeezed(have)) == 2:
            return 1.8, "squeeze"
        if have[0] == want[0] and num_elements(have) == num_elements(want):
            return 1.4, "reshape_kernel"
        return None
    if source.kind == "conv" and first and len(have) == len(want) and have[0] == want[0]:
        if have[2:] == want[2:] and min(have[1], want[1]) <= IMAGE_CHANNELS:
            return 1.0, "stem_channels"
        square = len(have) == 4 and have[2] == have[3] and want[2] == want[3]
        # Only patch embeddings (kernel = stride) may be resized; at least 8 pixels tells them from other stems.
        if square and have[1] == want[1] and min(have[2], want[2]) >= 8:
            return 1.0, "resize_patches"
    if source.kind == "linear" and last and have[1:] == want[1:]:
        return 0.7, "head"
    return None


def first_layer(layers: Sequence[Layer], flow: Dataflow | None) -> int | None:
    """The layer that sees the input: the first one used, or the first one registered where use is not known."""
    ordered = in_use_order(layers, flow) if flow else layers
    return next((layer.index for layer in ordered if layer.kind in WEIGHTED), None)


def score_matrix(source: Sequence[Layer], target: Sequence[Layer], firsts: tuple[int | None, int | None]) -> tuple[Scores, dict[tuple[int, int], str]]:
    """Scores of all pairs, computed once per distinct pair of signatures, and the transforms of those that need one."""
    a_classes, a_of = _classes(source, firsts[0])
    b_classes, b_of = _classes(target, firsts[1])
    small = np.full((len(a_classes), len(b_classes)), IMPOSSIBLE)
    how: dict[tuple[int, int], str] = {}
    for i, (a, a_ends) in enumerate(a_classes):
        for j, (b, b_ends) in enumerate(b_classes):
            if not _may_fit(a, b, (a_ends[0] and b_ends[0]) or (a_ends[1] and b_ends[1])):
                continue
            found = fit(a, b, (a_ends[0], b_ends[0], a_ends[1], b_ends[1]))
            if found is not None:
                small[i, j] = found[0]
                if found[1]:
                    how[i, j] = found[1]
    transforms = {}
    if how:
        members_a, members_b = defaultdict(list), defaultdict(list)
        for layer, of in zip(source, a_of):
            members_a[of].append(layer.index)
        for layer, of in zip(target, b_of):
            members_b[of].append(layer.index)
        transforms = {(i, j): name for (ca, cb), name in how.items() for i in members_a[ca] for j in members_b[cb]}
    return small[np.ix_(a_of, b_of)], transforms


def _may_fit(a: Layer, b: Layer, ends: bool) -> bool:
    """Cheap necessary conditions: most pairs of shapes fail them."""
    if a.kind == b.kind and a.kind in (*WEIGHTED, *NORMS):
        return ends or a.shape == b.shape
    if a.kind in WEIGHTED and b.kind in WEIGHTED:
        return a.shape[0] == b.shape[0]
    return a.kind not in (*WEIGHTED, *NORMS) and b.kind not in (*WEIGHTED, *NORMS)


def _classes(layers: Sequence[Layer], first: int | None) -> tuple[list[tuple[Layer, tuple[bool, bool]]], list[int]]:
    last = next((u.index for u in reversed(layers) if u.kind == "linear"), None)
    seen: dict[tuple[object, ...], int] = {}
    classes: list[tuple[Layer, tuple[bool, bool]]] = []
    of = []
    for layer in layers:
        ends = (layer.index == first, layer.index == last)
        key = (layer.signature, "bias" in layer.roles, ends, "relative" in layer.path, "attention_biases" in layer.path, layer.grid)
        if key not in seen:
            seen[key] = len(classes)
            classes.append((layer, ends))
        of.append(seen[key])
    return classes, of


class View:
    """One pair of sequences, aligned. `allowed` forbids pairs; `anchors` (target -> source) are given."""

    def __init__(
        self,
        name: str,
        source: Sequence[Layer],
        target: Sequence[Layer],
        *,
        anchors: Mapping[int, int],
        firsts: tuple[int | None, int | None],
        allowed: Callable[[Layer, Layer], bool] | None = None,
    ) -> None:
        self.name, self.source, self.target = name, source, target
        scores, self.transforms = score_matrix(source, target, firsts)
        if allowed is not None:
            for i, j in np.argwhere(scores > IMPOSSIBLE / 2):
                if not allowed(source[i], target[j]):
                    scores[i, j] = IMPOSSIBLE
        self.sole = _sole_pairs(scores, source, target, self.transforms)
        _anchor(scores, source, target, anchors)
        self.scores = scores
        self.alignment: Alignment = align(scores)

    @property
    def best(self) -> float:
        return self.alignment.best

    def candidates(self) -> Candidates:
        enough = self.best - TAU
        found: Candidates = {}
        for j, layer in enumerate(self.target):
            options: list[int | None] = [self.source[int(i)].index for i in np.flatnonzero(self.alignment.through[:, j] >= enough)]
            if self.alignment.skips_target[j] >= enough:
                options.append(None)
            found[layer.index] = options
        return found

    def margins(self) -> dict[tuple[int, int], float]:
        """(source, target) of each best pair -> by how much the best alignment without it is worse."""
        through = self.alignment.through
        alone = self.alignment
        columns, rows = _two_best(through.T), _two_best(through)
        margins = {}
        for j, i in enumerate(np.argmax(through, axis=0)):
            score = through[i, j]
            if score < IMPOSSIBLE / 2:
                continue
            # Without this pair: another partner for either, or none.
            rival = rows[i, 0] if rows[i, 0] > score else rows[i, 1]
            without = max(columns[j, 1], rival, alone.skips_target[j], alone.skips_source[i])
            margins[self.source[i].index, self.target[j].index] = float(min(score - without, 99.0))
        return margins


def _two_best(rows: Scores) -> Scores:
    """The largest and the second largest value of each row."""
    if rows.shape[1] == 1:
        return np.column_stack([rows[:, 0], np.full(len(rows), IMPOSSIBLE)])
    return -np.partition(-rows, 1, axis=1)[:, :2]


def _sole_pairs(scores: Scores, source: Sequence[Layer], target: Sequence[Layer], transforms: Mapping[tuple[int, int], str]) -> frozenset[tuple[int, int]]:
    possible = scores > IMPOSSIBLE / 2
    rows = np.flatnonzero(possible.sum(axis=1) == 1)
    pairs = [(int(i), int(np.argmax(possible[i]))) for i in rows]
    found = [(source[i].index, target[j].index) for i, j in pairs if possible[:, j].sum() == 1]
    return frozenset(pair for pair in found if transforms.get(pair) != "head")


def _anchor(scores: Scores, source: Sequence[Layer], target: Sequence[Layer], anchors: Mapping[int, int]) -> None:
    if not anchors:
        return
    row = {layer.index: i for i, layer in enumerate(source)}
    column = {layer.index: j for j, layer in enumerate(target)}
    given = [(row[i], column[j]) for j, i in anchors.items() if i in row and j in column]
    values = [max(scores[i, j], 1.0) + ANCHOR for i, j in given]
    for i, j in given:
        scores[i, :] = IMPOSSIBLE
        scores[:, j] = IMPOSSIBLE
    for (i, j), value in zip(given, values):
        scores[i, j] = value


def look(
    source: Sequence[Layer],
    target: Sequence[Layer],
    *,
    source_flow: Dataflow | None,
    target_flow: Dataflow | None,
    source_links: Mapping[int, set[Link]],
    target_links: Mapping[int, set[Link]],
    anchors: Mapping[int, int],
) -> Viewed:
    """Align in every order there is, and keep the candidates of the best views (of all within TAU of the best)."""
    sources = {"used": in_use_order(source, source_flow)} if source_flow else {"registered": list(source)}
    targets = {"registered": list(target)}
    if target_flow:
        targets["used"] = in_use_order(target, target_flow)
    firsts = first_layer(source, source_flow), first_layer(target, target_flow)
    views = [View(f"{a}/{b}", ours, theirs, anchors=anchors, firsts=firsts) for a, ours in sources.items() for b, theirs in targets.items()]
    best = max(view.best for view in views)
    sole = frozenset[tuple[int, int]]().union(*(view.sole for view in views))
    transforms = {pair: name for view in views for pair, name in view.transforms.items()}
    last_source, last_target = list(sources.values())[-1], list(targets.values())[-1]
    split = _split_view(last_source, last_target, source_links, target_links, anchors, firsts)
    # Layers and norms apart only where that explains clearly more: the attachment of norms is all that holds it together.
    if split.best > best + 1.5:
        return Viewed("layers, then norms", split.candidates, split.margins, transforms | split.transforms, sole)
    top = [view for view in views if view.best >= best - TAU]
    merged: dict[int, list[int | None]] = {layer.index: [] for layer in target}
    margins: dict[tuple[int, int], float] = {}
    for view in top:
        for j, options in view.candidates().items():
            merged[j] += [i for i in options if i not in merged[j]]
        for pair, margin in view.margins().items():
            margins[pair] = min(margin, margins.get(pair, margin))
    return Viewed(" + ".join(view.name for view in top), merged, margins, transforms, sole)


@dataclass
class _Split:
    best: float
    candidates: Candidates
    margins: dict[tuple[int, int], float]
    transforms: dict[tuple[int, int], str]


def _split_view(
    source: Sequence[Layer],
    target: Sequence[Layer],
    source_links: Mapping[int, set[Link]],
    target_links: Mapping[int, set[Link]],
    anchors: Mapping[int, int],
    firsts: tuple[int | None, int | None],
) -> _Split:
    """Weighted layers, norms and the rest aligned apart; a norm only with one whose convolution can be its convolution's."""
    result = _Split(0.0, {}, {}, {})

    def linked(a: Layer, b: Layer) -> bool:
        ours, theirs = source_links.get(a.index), target_links.get(b.index)
        if ours is None or theirs is None:
            return True
        return any(side == other and i in result.candidates.get(j, ()) for side, i in ours for other, j in theirs)

    for kinds in (WEIGHTED, NORMS, ("param", "vector", "buffer")):
        ours = [layer for layer in source if layer.kind in kinds]
        theirs = [layer for layer in target if layer.kind in kinds]
        if not theirs or not ours:
            result.candidates.update({layer.index: [None] for layer in theirs})
            continue
        view = View("", ours, theirs, anchors=anchors, firsts=firsts, allowed=linked if kinds is NORMS else None)
        result.best += view.best
        result.candidates.update(view.candidates())
        result.margins.update(view.margins())
        result.transforms.update(view.transforms)
    return result


Scores = NDArray[np.float64]
IMPOSSIBLE = -1e9
GAP_OPEN = 0.6
GAP_EXTEND = 0.02


@dataclass(frozen=True)
class Alignment:
    """`best`: the optimal score. `through[i, j]`: the best score of an alignment that pairs source i with target j.

    `skips_target[j]`, `skips_source[i]`: the best score of an alignment that leaves that one alone.
    """

    best: float
    through: Scores
    skips_target: Scores
    skips_source: Scores


def align(scores: Scores) -> Alignment:
    """Align source (rows) with target (columns); `scores` holds IMPOSSIBLE where two must not be paired."""
    pair, skip_source, skip_target = _forward(scores)
    pair_back, source_back, target_back = (matrix[::-1, ::-1] for matrix in _forward(scores[::-1, ::-1]))
    best = float(max(pair[-1, -1], skip_source[-1, -1], skip_target[-1, -1]))
    through = pair[1:, 1:] + pair_back[:-1, :-1] - scores
    through[scores < IMPOSSIBLE / 2] = IMPOSSIBLE
    # Both halves paid for opening the same gap.
    skips_target = (skip_target[:, 1:] + target_back[:, :-1]).max(axis=0) + GAP_OPEN
    skips_source = (skip_source[1:, :] + source_back[:-1, :]).max(axis=1) + GAP_OPEN
    return Alignment(best, through, skips_target, skips_source)


def _forward(scores: Scores) -> tuple[Scores, Scores, Scores]:
    """Best score of each prefix that ends in a pair, in a skipped source, in a skipped target."""
    num_source, num_target = scores.shape
    pair, skip_source, skip_target = (np.full((num_source + 1, num_target + 1), IMPOSSIBLE) for _ in range(3))
    pair[0, 0] = 0.0
    steps = np.arange(num_target + 1)
    for i in range(num_source + 1):
        if i:
            before = np.maximum(np.maximum(pair[i - 1], skip_source[i - 1]), skip_target[i - 1])
            pair[i, 1:] = scores[i - 1] + before[:-1]
            skip_source[i] = np.maximum(np.maximum(pair[i - 1], skip_target[i - 1]) - GAP_OPEN, skip_source[i - 1] - GAP_EXTEND)
        # A gap from column k to j costs open + extend * (j - k - 1): a running maximum replaces the loop over k.
        opened = np.maximum(pair[i], skip_source[i]) + GAP_EXTEND * steps
        reach = np.maximum.accumulate(opened)
        skip_target[i, 1:] = reach[:-1] - GAP_OPEN - GAP_EXTEND * (steps[1:] - 1)
    return pair, skip_source, skip_target
