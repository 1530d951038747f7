"""Planning without being told how: names where they can be trusted, then alignment, attachment, dataflow and structure.

The rule above all others: a pair is made when every view that knows something agrees and at least one argument for it does
not rest on the order of registration; what is left is flagged with its alternatives. `assume_order` lifts the second half.
The algorithm and the measurements behind its thresholds: docs/weight-transfer.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from dtl.checkpoint.transfer.layers.dataflow import (
    Candidates,
    Link,
    Mates,
    Side,
    complete_by_dataflow,
    graph_colours,
    links_by_dataflow,
    links_by_neighbours,
    producers,
    prune_by_dataflow,
)
from dtl.checkpoint.transfer.layers.layer import NORMS, Layer, loose_signature
from dtl.checkpoint.transfer.match.alignment import Viewed, in_use_order, look
from dtl.checkpoint.transfer.match.by_name import Trust
from dtl.checkpoint.transfer.match.decided import Decided
from dtl.checkpoint.transfer.match.evidence import NameEvidence, match_leftovers, match_recurring, match_trees, unique_shapes
from dtl.checkpoint.transfer.match.matching import Matching, layer_transform
from dtl.checkpoint.transfer.match.qkv import fuse_projections

NEW_NAME = "its name is new beside names that hold: another layer of that shape, or a renamed one"
LOST_ORDER = "the source keeps no order, and neither names nor numbers place it"
ORDER_ONLY = "only the order of registration tells it from other layers of its shape (assume_order: true accepts that)"


def match_auto(
    source: Side,
    target: Side,
    *,
    named: Matching,
    trust: Trust,
    heads: Sequence[Layer],
    in_order: bool,
    assume_order: bool,
) -> Matching:
    """Pair the layers of two networks. `named`: the matching by names and `trust` the judgement of it; `in_order`: whether the
    source's sequence can be the order of registration."""
    return _Auto(source, target, named, trust, heads, in_order, assume_order).run()


class _Auto:
    def __init__(
        self,
        source: Side,
        target: Side,
        named: Matching,
        trust: Trust,
        heads: Sequence[Layer],
        in_order: bool,
        assume_order: bool,
    ) -> None:
        self.named, self.trust, self.in_order, self.assume_order = named, trust, in_order, assume_order
        ours = fuse_projections(source.layers, target.layers)
        theirs = fuse_projections(target.layers, source.layers)
        if len(ours) != len(source.layers) or len(theirs) != len(target.layers):
            self.trust = _reindexed(trust, source.layers, ours, target.layers, theirs)
        self.source, self.target = Side(ours, source.flow), Side(theirs, target.flow)
        self.ours = {layer.index: layer for layer in ours}
        self.theirs = {layer.index: layer for layer in theirs}
        head_names = {name for layer in heads for name in layer.names}
        self.heads = {layer.index for layer in theirs if head_names.intersection(layer.names)}
        self.decided = Decided()

    def run(self) -> Matching:
        for j, i in self.trust.anchors.items():
            self.decided.put(j, i, "name")
        view = "names"
        if self._left_over():
            viewed = self._structure()
            view = viewed.name if not self.trust.anchors else f"names, then {viewed.name}"
        else:
            viewed = Viewed("", {}, {})
        return self._matching(view, viewed)

    def _left_over(self) -> bool:
        """Whether both sides still have layers that could be each other's."""
        used = set(self.decided.certain.values())
        ours = {loose_signature(layer) for layer in self.source.layers if layer.index not in used}
        return any(layer.index not in self.decided.certain and loose_signature(layer) in ours for layer in self.target.layers)

    # --- the views ---

    def _structure(self) -> Viewed:
        self.names = NameEvidence(self.source.layers, self.target.layers, distrusted=self.trust.distrusted)
        self.mates = Mates(self.source, self.target)
        self.our_links = _links(self.source)
        self.their_links = _links(self.target)
        viewed = look(
            self.source.layers,
            self.target.layers,
            source_flow=self.source.flow,
            target_flow=self.target.flow,
            source_links=self.our_links,
            target_links=self.their_links,
            anchors=self.trust.anchors,
        )
        self.candidates: Candidates = viewed.candidates
        self.transforms = viewed.transforms
        self.sole = viewed.sole
        self.trees = match_trees(self.source.layers, self.target.layers, target_rank=self._use_ranks()) if self.trust.numbers else {}
        self.unique = unique_shapes(self.source.layers, self.target.layers)
        self._certain_by_views()
        self._names_break_ties()
        self._unique_and_dataflow()
        self.recurring = match_recurring(self.ours, self.theirs, self._without_order_certain())
        self._names_recur()
        self._names_contradict()
        self._trees_agree()
        if self.assume_order:
            self._last_of_a_block()
        self._norms_follow_layers()
        self._order_alone()
        self._list_doubts()
        return viewed

    def _use_ranks(self) -> dict[int, int] | None:
        if self.target.flow is None:
            return None
        return {layer.index: rank for rank, layer in enumerate(in_use_order(self.target.layers, self.target.flow))}

    def _certain_by_views(self) -> None:
        """Exactly one candidate both ways, and no near-optimal alignment that skips it; repeated as dataflow prunes the rest."""
        for _ in range(4):
            found = _only(self.candidates)
            for j, i in found.items():
                if j not in self.decided.certain:
                    self.decided.put(j, i, "structure")
            if not self._prune():
                return

    def _prune(self) -> bool:
        taken = {i: j for j, i in self.decided.certain.items()}
        changed = False
        for j, options in self.candidates.items():
            kept = [i for i in options if i is None or taken.get(i, j) == j]
            if j not in self.decided.certain and len(kept) < len(options):
                self.candidates[j] = kept
                changed = True
        if self.source.flow and self.target.flow:
            before, after = producers(self.source.layers, self.source.flow), producers(self.target.layers, self.target.flow)
            changed |= prune_by_dataflow(self.candidates, self.decided.certain, before, after)
        return changed

    def _names_break_ties(self) -> None:
        for j, options in self.candidates.items():
            i = self.names.best(j)
            if j not in self.decided.certain and i is not None and i in options and i not in self._taken():
                self.decided.put(j, i, "name")

    def _unique_and_dataflow(self) -> None:
        for j, i in self.unique.items():
            if j not in self.decided.certain and i not in self._taken():
                self.decided.put(j, i, "unique-shape")
        if self.source.flow and self.target.flow:
            found = complete_by_dataflow(self.source.layers, self.target.layers, self.decided.certain, self.source.flow, self.target.flow)
            for j, i in found.items():
                self.decided.put(j, i, "graph")

    def _without_order_certain(self) -> dict[int, int]:
        """What names, numbers and shapes pair, each for itself, and nothing else contradicts."""
        said: dict[int, set[int]] = defaultdict(set)
        for pairs in (self.trust.anchors, self.unique, self.trees):
            for j, i in pairs.items():
                said[j].add(i)
        for j in self.theirs:
            like = self.names.best(j)
            if like is not None:
                said[j].add(like)
        agreed = {j: next(iter(each)) for j, each in said.items() if len(each) == 1}
        asked = Counter(agreed.values())
        return {j: i for j, i in agreed.items() if asked[i] == 1 and self.decided.certain.get(j, i) == i}

    def _names_recur(self) -> None:
        for j, i in self.recurring.items():
            now = self.decided.certain.get(j)
            if now is not None and now != i and j not in self.trust.anchors and not self.transforms.get((now, j)):
                self.decided.doubt(j, "the names of its other blocks speak for another layer", [now, i])
            elif now is None and i not in self._taken() and (i in self.candidates.get(j, ()) or not self.in_order):
                self.decided.put(j, i, "pattern")

    def _last_of_a_block(self) -> None:
        for j, i in match_leftovers(self.source.layers, self.target.layers, self.decided.certain).items():
            if j not in self.heads:
                self.decided.put(j, i, "order")

    # --- what speaks against ---

    def _names_contradict(self) -> None:
        """Another layer of the shape has a name that fits clearly better: structure and names disagree, nobody is believed."""
        for j, i in list(self.decided.certain.items()):
            if j in self.trust.anchors or self.transforms.get((i, j)):
                continue
            better = self.names.better(i, j)
            if better:
                self.decided.doubt(j, "structure and names disagree", [i, *better])

    def _trees_agree(self) -> None:
        if not self.in_order and self.source.flow is None:
            self._without_order()
            return
        if self.source.flow is None:
            for j, i in list(self.decided.certain.items()):
                other = self.trees.get(j, i)
                if other != i and j not in self.trust.anchors and not self.transforms.get((i, j)):
                    self.decided.doubt(j, "the order and the numbers in the names disagree", [i, other])
        for j, i in self.trees.items():
            if j in self.decided.certain or j in self.decided.doubts or i in self._taken():
                continue
            if i in self.candidates.get(j, ()):
                self.decided.put(j, i, "tree+number")

    def _without_order(self) -> None:
        """Sorted names: what the alignment says of their order is noise; keep what names, numbers or shapes say."""
        for j, i in list(self.decided.certain.items()):
            if j in self.trust.anchors or self.unique.get(j) == i or self.trees.get(j) == i or self.names.best(j) == i:
                continue
            if self.recurring.get(j) == i or (i, j) in self.sole:
                continue
            self.decided.doubt(j, LOST_ORDER, [i])
        for pairs, evidence in ((self.trees, "tree+number"), ({j: i for i, j in sorted(self.sole)}, "unique-shape")):
            for j, i in pairs.items():
                if j not in self.decided.certain and j not in self.heads and i not in self._taken():
                    self.decided.put(j, i, evidence)
        for j, i in self.mates.pairs(self.decided.certain).items():
            doubt = self.decided.doubts.get(j, (LOST_ORDER,))[0]
            if j not in self.decided.certain and i not in self._taken() and doubt == LOST_ORDER:
                self.decided.put(j, i, "structure")

    def _norms_follow_layers(self) -> None:
        """A norm is loaded beside the layer it was trained with or not at all."""
        before = producers(self.target.layers, self.target.flow)[0] if self.target.flow else {}
        for j, i in list(self.decided.certain.items()):
            layer = self.theirs[j]
            links = self.their_links.get(j)
            if layer.kind not in NORMS or not links or j in self.trust.anchors:
                continue
            post = {link for link in links if link[0] == "post"}
            # A BatchNorm with one producer belongs to that producer; others (pre-norm, sums) to any neighbour.
            binding = post if layer.kind == "bn" and len(before.get(j, ())) == 1 and post else links
            mates = {(side, self.decided.certain[other]) for side, other in binding if other in self.decided.certain}
            known = self.our_links.get(i) if self.in_order or self.source.flow else None
            if not mates or (known and not mates & known):
                self.decided.doubt(j, "its convolution is not the one it was trained with", [i])

    # --- evidence ---

    def _order_alone(self) -> None:
        """Tell pairs that rest on the order of registration alone from those with another argument."""
        free = self._free_of_order()
        self._last_without_order(free)
        for j in list(self.decided.certain):
            if j in self.trust.anchors:
                continue
            if j in free:
                self.decided.evidence[j] = free[j]
            elif self.assume_order:
                self.decided.evidence[j] = "order"
            else:
                self.decided.doubt(j, NEW_NAME if self._is_new_name(j) else ORDER_ONLY, [self.decided.certain[j]])

    def _free_of_order(self) -> dict[int, str]:
        """Target layer -> the argument for its pair that needs no order."""
        if self.source.flow is None and any(layer.flat for layer in self.source.layers):
            # Where names say nothing, even what belongs to one layer was read off the order.
            return {}
        colours = graph_colours(self.source.layers, self.source.flow) if self.source.flow else {}
        sharing: dict[tuple[object, int | None], int] = defaultdict(int)
        for layer in self.source.layers:
            sharing[loose_signature(layer), colours.get(layer.index)] += 1
        found = {}
        for j, i in self.decided.certain.items():
            # Beside names that hold everywhere else a new name means a new layer, whatever its shape.
            if self._is_new_name(j) and not self.transforms.get((i, j)) and self.names.best(j) != i:
                continue
            if self.unique.get(j) == i or (i, j) in self.sole:
                found[j] = "unique-shape"
            elif self.names.best(j) == i:
                found[j] = "name"
            elif self.trees.get(j) == i:
                found[j] = "tree+number"
            elif self.recurring.get(j) == i:
                found[j] = "pattern"
            elif colours and sharing[loose_signature(self.ours[i]), colours[i]] == 1:
                found[j] = "graph"
        self._norms_with_their_layers(found)
        return found

    def _is_new_name(self, j: int) -> bool:
        # Of a head its place says what it is, whatever it is called.
        return self.trust.new_names and j not in self.trust.anchors and j not in self.trust.distrusted and j not in self.heads

    def _norms_with_their_layers(self, found: dict[int, str]) -> None:
        """A norm that names or dataflow tie to a layer shares that layer's evidence."""
        for j, i in self.decided.certain.items():
            if j not in found and self.theirs[j].kind in NORMS and self.mates.agree(i, j, {layer: self.decided.certain[layer] for layer in found}):
                found[j] = "structure"

    def _last_without_order(self, free: dict[int, str]) -> None:
        """What is left over, one of its shape, of two blocks whose other layers are each other's for reasons other than order."""
        base = {j: i for j, i in self.decided.certain.items() if j in free or j in self.trust.anchors}
        for j, i in match_leftovers(self.source.layers, self.target.layers, base, whole=True).items():
            if self.decided.certain.get(j, i) == i and (j in self.decided.certain or i not in self._taken()) and not self._is_new_name(j):
                self.decided.put(j, i, "structure")
                free[j] = "structure"

    def _list_doubts(self) -> None:
        taken = self._taken()
        for j, options in self.candidates.items():
            if j in self.decided.certain or j in self.decided.doubts or j in self.heads:
                continue
            left = [i for i in options if i is not None and i not in taken and self.transforms.get((i, j)) != "head"]
            if left:
                self.decided.doubts[j] = (
                    "several layers fit equally well" if len(options) > 1 else "it fits, but so does it elsewhere",
                    left,
                )

    def _taken(self) -> set[int]:
        return set(self.decided.certain.values())

    # --- the result ---

    def _matching(self, view: str, viewed: Viewed) -> Matching:
        matching = Matching(view, clashes=list(self.named.clashes), notes=list(self.named.notes))
        for j, i in sorted(self.decided.certain.items()):
            transform = viewed.transforms.get((i, j), "")
            if transform == "head":
                continue
            if j in self.trust.mapped:
                fits = layer_transform(self.ours[i], self.theirs[j], first=True)
                if fits is not None:
                    matching.pair(self.ours[i], self.theirs[j], transform=fits, evidence="map")
                continue
            if j in self.trust.anchors:
                # The matching by names knows the transforms of its own pairs.
                matching.matches.update({name: self.named.matches[name] for name in self.theirs[j].names if name in self.named.matches})
                continue
            fused = any(len(key) > 1 for key, _ in self.ours[i].roles.values())
            matching.pair(
                self.ours[i],
                self.theirs[j],
                transform="fuse" if fused else transform,
                evidence=self.decided.evidence[j],
                margin=viewed.margins.get((i, j)),
            )
        for j, (reason, options) in sorted(self.decided.doubts.items()):
            if j not in self.heads:
                matching.flag(self.theirs[j], reason, [(self.ours[i], viewed.transforms.get((i, j), "")) for i in options[:6]])
        self._flags_of_names(matching)
        return matching

    def _flags_of_names(self, matching: Matching) -> None:
        """Norms whose kind changed stay in doubt; plain clashes of shape are fresh, and told."""
        clashed = {clash.target.rpartition(".")[0] for clash in matching.clashes}
        for name, flag in self.named.flags.items():
            if name in matching.matches or name in matching.flags or not self.trust.as_a_whole:
                continue
            if name.rpartition(".")[0] not in clashed:
                matching.flags[name] = flag


def _links(side: Side) -> dict[int, set[Link]]:
    return links_by_dataflow(side.layers, side.flow) if side.flow else links_by_neighbours(side.layers)


def _only(candidates: Candidates) -> dict[int, int]:
    wanted: dict[int, list[int]] = defaultdict(list)
    for j, options in candidates.items():
        for i in options:
            if i is not None:
                wanted[i].append(j)
    return {j: options[0] for j, options in candidates.items() if len(options) == 1 and options[0] is not None and len(wanted[options[0]]) == 1}


def _reindexed(trust: Trust, ours: list[Layer], new_ours: list[Layer], theirs: list[Layer], new_theirs: list[Layer]) -> Trust:
    """Trust in terms of the fused lists of layers."""

    def moved(old: list[Layer], new: list[Layer]) -> dict[int, int]:
        where = {name: layer.index for layer in new for name in layer.names}
        return {layer.index: where[layer.names[0]] for layer in old}

    a, b = moved(ours, new_ours), moved(theirs, new_theirs)
    whole = {layer.index for layer in new_theirs if any(len(key) == 1 for key, _ in layer.roles.values())}
    anchors = {b[j]: a[i] for j, i in trust.anchors.items() if b[j] in whole}
    return Trust(trust.as_a_whole, anchors, {b[j] for j in trust.distrusted}, trust.numbers, {b[j] for j in trust.mapped}, trust.new_names)
