"""Planning on its own (`by: auto`): names where they can be trusted, then views of structure that claim pairs, and one arbiter.

A view looks at both networks in one way (alignment, names, shapes, dataflow, words that recur, numbers, norms) and claims pairs; it knows no other
view and changes nothing. The arbiter asks the views in the order of their `rank`, whatever order they are given in, accepts what is still open on both
sides, and withdraws what another view objects to. The rule above all others: a pair is made when no view objects to it
and at least one claim for it does not rest on the order of registration; what is left is flagged with its alternatives. `assume_order` lifts
the second half. The algorithm and the measurements behind its thresholds: docs/weight-transfer.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

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
from dtl.checkpoint.transfer.layers.layer import NORMS, Layer, fuse_projections, layer_transform, loose_signature
from dtl.checkpoint.transfer.match.alignment import Viewed, in_use_order, look
from dtl.checkpoint.transfer.match.by_name import Trust
from dtl.checkpoint.transfer.match.evidence import NEW_NAME, Matching, NameEvidence, match_leftovers, match_recurring, match_trees, unique_shapes

LOST_ORDER = "the order of the layers in the source is unknown (its names are sorted), and neither names nor numbers identify this one"
ORDER_ONLY = "only the order of registration distinguishes it from other layers of its shape (assume_order: true accepts that)"

NAMES_DISAGREE, NUMBERS_DISAGREE = "structure and names disagree", "the order and the numbers in the names disagree"
ORDER_REFUTED = "only the order of registration distinguishes it, and for another layer of its shape names or numbers contradict that order"

EVIDENCE = ("unique-shape", "name", "tree+number", "pattern", "graph", "structure")
"""Which of several claims that need no order is reported."""


@dataclass(frozen=True)
class Claim:
    """A view's argument for a pair. `needs_order`: it holds only if both networks register their layers in one order."""

    target: int
    source: int
    evidence: str
    needs_order: bool = False


@dataclass(frozen=True)
class Objection:
    """A view's argument against the accepted pair of `target`. `options`: source layers that would fit."""

    target: int
    reason: str
    options: tuple[int, ...]


@dataclass
class Case:
    """Both networks and what has been accepted: all that a view sees."""

    source: Side
    target: Side
    trust: Trust
    heads: frozenset[int]
    in_order: bool
    assume_order: bool
    accepted: dict[int, int] = field(default_factory=dict)
    """Target layer -> source layer."""
    free: dict[int, str] | None = None
    """Accepted targets whose pair needs no order -> the evidence; None until nothing is left to accept or withdraw."""

    def __post_init__(self) -> None:
        self.ours = {layer.index: layer for layer in self.source.layers}
        self.theirs = {layer.index: layer for layer in self.target.layers}
        self.viewed = Viewed("", {}, {})

    @property
    def order_is_lost(self) -> bool:
        """Sorted names and no network to run: an alignment of their order is noise."""
        return not self.in_order and self.source.flow is None

    def is_new_name(self, j: int) -> bool:
        # A head is known by its place, whatever it is called.
        return self.trust.new_names and j not in self.trust.anchors and j not in self.trust.distrusted and j not in self.heads

    def may_be_contested(self, j: int) -> bool:
        return j not in self.trust.anchors and not self.viewed.transforms.get((self.accepted[j], j))


class View:
    """One way to look at both networks."""

    rank: ClassVar[int]
    """The precedence of its claims: views of a lower rank are asked first, those from `WEAK` on when no objection is left."""
    settles_doubts: ClassVar[bool] = False
    """Whether its claims that need no order may, at the end, pair a layer that an objection left open."""

    def claims(self, case: Case) -> Iterable[Claim]:
        return ()

    def objections(self, case: Case) -> Iterable[Objection]:
        return ()

    def last_objections(self, case: Case) -> Iterable[Objection]:
        """Taken once, when nothing else is to be accepted or withdrawn."""
        return ()


WEAK = 10
"""Trees of modules, norms and leftovers: their claims would hide what other views object to."""


class Alignment(View):
    """Exactly one candidate both ways, and no near-optimal alignment that skips it; dataflow prunes the candidates."""

    rank = 1

    def __init__(self, case: Case) -> None:
        self.neighbours = tuple(producers(side.layers, side.flow) for side in (case.source, case.target) if side.flow)

    def candidates(self, case: Case) -> Candidates:
        """What alignment leaves possible beside the pairs accepted so far."""
        taken = {i: j for j, i in case.accepted.items()}
        left: Candidates = {}
        for j, options in case.viewed.candidates.items():
            left[j] = options if j in case.accepted else [i for i in options if i is None or taken.get(i, j) == j]
        if len(self.neighbours) == 2:
            while prune_by_dataflow(left, case.accepted, *self.neighbours):
                pass
        return left

    def claims(self, case: Case) -> Iterator[Claim]:
        candidates = self.candidates(case)
        wanted = Counter(i for options in candidates.values() for i in options if i is not None)
        for j, options in candidates.items():
            if len(options) == 1 and options[0] is not None and wanted[options[0]] == 1:
                yield Claim(j, options[0], "structure", needs_order=True)


class Names(View):
    """The name that fits clearly best among all layers of the shape; and against pairs beside which another name fits better."""

    rank = 2

    def __init__(self, case: Case) -> None:
        self.names = NameEvidence(case.source.layers, case.target.layers, distrusted=case.trust.distrusted)
        self.best = cache(self.names.best)

    def claims(self, case: Case) -> Iterator[Claim]:
        for j in case.theirs:
            i = self.best(j)
            if i is not None:
                yield Claim(j, i, "name")

    def objections(self, case: Case) -> Iterator[Objection]:
        for j, i in case.accepted.items():
            if case.may_be_contested(j) and (better := self.names.better(i, j)):
                yield Objection(j, NAMES_DISAGREE, (i, *better))


class Shapes(View):
    """The only layers of their shape; with a source that lost its order also pairs where either fits nothing else."""

    rank = 3

    def __init__(self, case: Case) -> None:
        self.unique = unique_shapes(case.source.layers, case.target.layers)

    def claims(self, case: Case) -> Iterator[Claim]:
        for j, i in self.unique.items():
            yield Claim(j, i, "unique-shape")
        for i, j in sorted(case.viewed.sole):
            if case.accepted.get(j) == i or (case.order_is_lost and j not in case.heads):
                yield Claim(j, i, "unique-shape")


class Flow(View):
    """Layers with accepted neighbours on all the same sides, and no rival that has. A place of its own in the source's dataflow needs no order."""

    rank = 4

    def __init__(self, case: Case) -> None:
        flow = case.source.flow
        self.colours = graph_colours(case.source.layers, flow) if flow else {}
        self.sharing = Counter((loose_signature(layer), self.colours.get(layer.index)) for layer in case.source.layers)

    def claims(self, case: Case) -> Iterator[Claim]:
        if case.source.flow and case.target.flow:
            for j, i in complete_by_dataflow(case.source.layers, case.target.layers, case.accepted, case.source.flow, case.target.flow).items():
                yield Claim(j, i, "graph", needs_order=True)
        for j, i in case.accepted.items():
            if self.colours and self.sharing[loose_signature(case.ours[i]), self.colours[i]] == 1:
                yield Claim(j, i, "graph")


class Patterns(View):
    """Words that recur, learned from what names, numbers and shapes pair, each for itself."""

    rank = 5

    def __init__(self, others: Sequence[View]) -> None:
        self.others = others

    def claims(self, case: Case) -> Iterator[Claim]:
        for j, i in self._recurring(case).items():
            yield Claim(j, i, "pattern")

    def objections(self, case: Case) -> Iterator[Objection]:
        for j, i in self._recurring(case).items():
            now = case.accepted.get(j, i)
            if now != i and case.may_be_contested(j):
                yield Objection(j, "the names in the other blocks point to another layer", (now, i))

    def _recurring(self, case: Case) -> dict[int, int]:
        proposed: dict[int, set[int]] = defaultdict(set)
        for j, i in case.trust.anchors.items():
            proposed[j].add(i)
        for view in self.others:
            for claim in view.claims(case):
                proposed[claim.target].add(claim.source)
        agreed = {j: next(iter(each)) for j, each in proposed.items() if len(each) == 1}
        asked = Counter(agreed.values())
        base = {j: i for j, i in agreed.items() if asked[i] == 1 and case.accepted.get(j, i) == i}
        return match_recurring(case.ours, case.theirs, base)


class Trees(View):
    """Modules of the same content, told apart by the numbers in their names."""

    rank = WEAK

    def __init__(self, case: Case) -> None:
        self.pairs = match_trees(case.source.layers, case.target.layers, target_rank=_use_ranks(case.target)) if case.trust.numbers else {}

    def claims(self, case: Case) -> Iterator[Claim]:
        for j, i in self.pairs.items():
            yield Claim(j, i, "tree+number")

    def objections(self, case: Case) -> Iterator[Objection]:
        if case.source.flow is not None:
            return
        for j, i in case.accepted.items():
            other = self.pairs.get(j, i)
            if other != i and case.may_be_contested(j):
                yield Objection(j, NUMBERS_DISAGREE, (i, other))


class Norms(View):
    """A norm that names or dataflow tie to a layer goes where that layer goes."""

    rank = WEAK + 1

    def __init__(self, case: Case) -> None:
        self.mates = Mates(case.source, case.target)

    def claims(self, case: Case) -> Iterator[Claim]:
        if case.order_is_lost:
            for j, i in self.mates.pairs(case.accepted).items():
                yield Claim(j, i, "structure")
        layers = {j: case.accepted[j] for j in case.free or ()}
        for j, i in case.accepted.items():
            if case.theirs[j].kind in NORMS and self.mates.agree(i, j, layers):
                yield Claim(j, i, "structure")


class Leftovers(View):
    """What is left over, one of its shape, of two blocks whose other layers are each other's."""

    rank = WEAK + 2
    settles_doubts = True

    def claims(self, case: Case) -> Iterator[Claim]:
        ours, theirs = case.source.layers, case.target.layers
        if case.free is not None:
            base = {j: i for j, i in case.accepted.items() if j in case.free or j in case.trust.anchors}
            for j, i in match_leftovers(ours, theirs, base, whole=True).items():
                if not case.is_new_name(j):
                    yield Claim(j, i, "structure")
        elif case.assume_order:
            for j, i in match_leftovers(ours, theirs, case.accepted).items():
                if j not in case.heads:
                    yield Claim(j, i, "order", needs_order=True)


class Attachment(View):
    """A norm is loaded beside the layer it was trained with or not at all. Asked when nothing else is left to decide."""

    rank = WEAK + 3

    def __init__(self, case: Case, our_links: Mapping[int, set[Link]], their_links: Mapping[int, set[Link]]) -> None:
        self.our_links, self.their_links = our_links, their_links
        self.before = producers(case.target.layers, case.target.flow)[0] if case.target.flow else {}

    def last_objections(self, case: Case) -> Iterator[Objection]:
        for j, i in case.accepted.items():
            layer = case.theirs[j]
            links = self.their_links.get(j)
            if layer.kind not in NORMS or not links or j in case.trust.anchors:
                continue
            post = {link for link in links if link[0] == "post"}
            # A BatchNorm with one producer belongs to that producer; others (pre-norm, sums) to any neighbour.
            binding = post if layer.kind == "bn" and len(self.before.get(j, ())) == 1 and post else links
            mates = {(side, case.accepted[other]) for side, other in binding if other in case.accepted}
            known = self.our_links.get(i) if not case.order_is_lost else None
            if not mates or (known and not mates & known):
                yield Objection(j, "it would be loaded without the convolution that it was trained with", (i,))


Doubt = tuple[str, Sequence[int]]
"""(reason, source layers that would fit)."""


class Arbiter:
    """Decides which claims become pairs.

    Until nothing changes: the strong views claim; then all views may object to what is accepted, and a pair with an objection is withdrawn for good;
    then the weak views claim. At the end a norm without its layer and a pair that rests on order alone are withdrawn too. A claim is accepted
    where both layers are still free and, for views of names, where alignment leaves it possible. With a source that lost its order (sorted
    names), claims that need order are void.

    `evidence`: accepted target -> why. `doubts`: target -> why it is left open. `void`: target -> source of void claims.
    """

    def __init__(self, case: Case, alignment: Alignment, names: Names, views: Iterable[View]) -> None:
        self.case, self.alignment, self.names = case, alignment, names
        self.views = sorted(views, key=lambda view: view.rank)
        self.evidence = dict.fromkeys(case.accepted, "name")
        self.doubts: dict[int, Doubt] = {}
        self.void: dict[int, int] = {}

    def decide(self) -> None:
        strong = [view for view in self.views if view.rank < WEAK]
        weak = [view for view in self.views if view.rank >= WEAK]
        while self._ask(strong) or self._contest() or self._ask(weak):
            pass
        self._withdraw([objection for view in weak for objection in view.last_objections(self.case)])
        self._require_more_than_order()
        self._list_doubts()

    def _ask(self, views: Sequence[View]) -> bool:
        found = False
        for view in views:
            while self._accept(view.claims(self.case)):
                found = True
        return found

    def _accept(self, claims: Iterable[Claim]) -> bool:
        case = self.case
        claims = sorted(claims, key=lambda claim: (claim.target, claim.source))
        candidates = {} if case.order_is_lost else self.alignment.candidates(case)
        taken = set(case.accepted.values())
        found = False
        for claim in claims:
            j, i = claim.target, claim.source
            if j in case.accepted or j in self.doubts or i in taken:
                continue
            if claim.needs_order and case.order_is_lost:
                self.void.setdefault(j, i)
                continue
            if claim.evidence in ("name", "pattern", "tree+number") and not case.order_is_lost and i not in candidates.get(j, ()):
                continue
            case.accepted[j], self.evidence[j] = i, claim.evidence
            taken.add(i)
            found = True
        return found

    def _contest(self) -> bool:
        return self._withdraw([objection for view in self.views for objection in view.objections(self.case)])

    def _withdraw(self, objections: Sequence[Objection]) -> bool:
        for objection in objections:
            self._doubt(objection.target, objection.reason, objection.options)
        return bool(objections)

    def _doubt(self, j: int, reason: str, options: Sequence[int]) -> None:
        self.case.accepted.pop(j, None)
        self.evidence.pop(j, None)
        self.doubts.setdefault(j, (reason, list(options)))

    def _require_more_than_order(self) -> None:
        """Withdraw what rests on the order of registration alone, unless that is assumed."""
        case = self.case
        case.free = {}
        for view in self.views:
            for claim in list(view.claims(case)):
                j, i = claim.target, claim.source
                if claim.needs_order or self._is_no_evidence(claim) or case.accepted.get(j, i) != i:
                    continue
                if j not in case.accepted:
                    if not view.settles_doubts or i in case.accepted.values():
                        continue
                    case.accepted[j] = i
                    self.doubts.pop(j, None)
                before = case.free.get(j, claim.evidence)
                case.free[j] = min(before, claim.evidence, key=EVIDENCE.index)
        for j in self._out_of_number() if case.assume_order else ():
            self._doubt(j, NUMBERS_DISAGREE, [case.accepted[j]])
        refuted = {loose_signature(case.theirs[j]) for j, (reason, _) in self.doubts.items() if reason in (NAMES_DISAGREE, NUMBERS_DISAGREE)}
        for j, i in list(case.accepted.items()):
            if j in case.trust.anchors:
                continue
            if j not in case.free and case.assume_order and loose_signature(case.theirs[j]) in refuted:
                self._doubt(j, ORDER_REFUTED, [i])
            elif j in case.free:
                self.evidence[j] = case.free[j]
            elif case.assume_order:
                self.evidence[j] = "order"
            else:
                self._doubt(j, NEW_NAME if case.is_new_name(j) else ORDER_ONLY, [i])

    def _out_of_number(self) -> list[int]:
        """The target's layers that rest on order alone and lie in modules of other numbers than their source, where all that rests on more has the same."""
        case = self.case
        alike = {j: _module_numbers(case.theirs[j]) == _module_numbers(case.ours[i]) for j, i in case.accepted.items()}
        known = {*(case.free or ()), *case.trust.anchors} & alike.keys()
        if not all(alike[j] for j in known) or len({_module_numbers(case.theirs[j]) for j in known} - {()}) < 3:
            return []
        return [j for j in alike if not alike[j] and j not in known]

    def _is_no_evidence(self, claim: Claim) -> bool:
        case, pair = self.case, (claim.source, claim.target)
        if claim.evidence == "structure":
            return False
        if case.source.flow is None and any(layer.flat for layer in case.source.layers):
            # Where names carry no roles, even what belongs to one layer was read off the order.
            return True
        # Beside names that hold everywhere else a new name means a new layer, whatever its shape.
        return case.is_new_name(claim.target) and not case.viewed.transforms.get(pair) and self.names.best(claim.target) != claim.source

    def _list_doubts(self) -> None:
        case = self.case
        taken = set(case.accepted.values())
        for j, i in self.void.items():
            if j not in case.accepted and i not in taken:
                self.doubts.setdefault(j, (LOST_ORDER, [i]))
        for j, options in self.alignment.candidates(case).items():
            if j in case.accepted or j in self.doubts or j in case.heads:
                continue
            left = [i for i in options if i is not None and i not in taken and case.viewed.transforms.get((i, j)) != "head"]
            if left:
                reason = "several layers fit equally well" if len(options) > 1 else "a layer of the source fits, but it fits other layers as well"
                self.doubts[j] = (reason, left)


def _module_numbers(layer: Layer) -> tuple[str, ...]:
    """The parts of the path that are numbers."""
    return tuple(part for part in layer.path.split(".") if part.isdigit())


# ---- the whole


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
    ours, theirs = fuse_projections(source.layers, target.layers), fuse_projections(target.layers, source.layers)
    if any([layer.path for layer in new] != [layer.path for layer in old] for new, old in ((ours, source.layers), (theirs, target.layers))):
        trust = _reindexed(trust, source.layers, ours, target.layers, theirs)
    head_names = {name for layer in heads for name in layer.names}
    apart = frozenset(layer.index for layer in theirs if head_names.intersection(layer.names))
    case = Case(Side(ours, source.flow), Side(theirs, target.flow), trust, apart, in_order, assume_order, dict(trust.anchors))
    if not _left_over(case):
        return _matching(case, named, "names", {}, {})
    arbiter = consider(case)
    view = case.viewed.name if not trust.anchors else f"names, then {case.viewed.name}"
    return _matching(case, named, view, arbiter.evidence, arbiter.doubts)


def consider(case: Case) -> Arbiter:
    """Ask all views about a case."""
    our_links, their_links = _links(case.source), _links(case.target)
    case.viewed = look(
        case.source.layers,
        case.target.layers,
        source_flow=case.source.flow,
        target_flow=case.target.flow,
        source_links=our_links,
        target_links=their_links,
        anchors=case.trust.anchors,
    )
    alignment, names, shapes, trees = Alignment(case), Names(case), Shapes(case), Trees(case)
    views = [alignment, names, shapes, Flow(case), Patterns([names, shapes, trees]), trees, Norms(case), Leftovers(), Attachment(case, our_links, their_links)]
    arbiter = Arbiter(case, alignment, names, views)
    arbiter.decide()
    return arbiter


def _left_over(case: Case) -> bool:
    """Whether both sides still have layers that could be each other's."""
    used = set(case.accepted.values())
    ours = {loose_signature(layer) for layer in case.source.layers if layer.index not in used}
    return any(layer.index not in case.accepted and loose_signature(layer) in ours for layer in case.target.layers)


def _matching(case: Case, named: Matching, view: str, evidence: Mapping[int, str], doubts: Mapping[int, Doubt]) -> Matching:
    matching = Matching(view, clashes=list(named.clashes), notes=list(named.notes))
    transforms = case.viewed.transforms
    for j, i in sorted(case.accepted.items()):
        ours, theirs = case.ours[i], case.theirs[j]
        if transforms.get((i, j)) == "head":
            continue
        if j in case.trust.mapped:
            fits = layer_transform(ours, theirs, first=True)
            if fits is not None:
                matching.pair(ours, theirs, transform=fits, evidence="map")
        elif j in case.trust.anchors:
            # The matching by names knows the transforms of its own pairs.
            matching.matches.update({name: named.matches[name] for name in theirs.names if name in named.matches})
        else:
            fused = any(len(key) > 1 for key, _ in ours.roles.values())
            transform = "fuse" if fused else transforms.get((i, j), "")
            matching.pair(ours, theirs, transform=transform, evidence=evidence[j], margin=case.viewed.margins.get((i, j)))
    for j, (reason, options) in sorted(doubts.items()):
        if j not in case.heads:
            matching.flag(case.theirs[j], reason, [(case.ours[i], transforms.get((i, j), "")) for i in options[:6]])
    # Norms whose kind changed stay in doubt; plain clashes of shape are fresh, and reported.
    clashed = {clash.target.rpartition(".")[0] for clash in matching.clashes}
    for name, flag in named.flags.items():
        if case.trust.as_a_whole and name not in matching.matches and name not in matching.flags and name.rpartition(".")[0] not in clashed:
            matching.flags[name] = flag
    return matching


def _links(side: Side) -> dict[int, set[Link]]:
    return links_by_dataflow(side.layers, side.flow) if side.flow else links_by_neighbours(side.layers)


def _use_ranks(side: Side) -> dict[int, int] | None:
    """When each layer is used."""
    return {layer.index: rank for rank, layer in enumerate(in_use_order(side.layers, side.flow))} if side.flow else None


def _reindexed(trust: Trust, ours: list[Layer], new_ours: list[Layer], theirs: list[Layer], new_theirs: list[Layer]) -> Trust:
    """Trust in terms of the fused lists of layers. An anchor is what two layers have in common: of a q whose weight is now in a fused layer, the bias."""
    our_place, their_place = ({name: layer.index for layer in new for name in layer.names} for new in (new_ours, new_theirs))
    whole = {layer.index for layer in new_theirs if any(len(key) == 1 for key, _ in layer.roles.values())}
    anchors = {}
    for j, i in trust.anchors.items():
        common = theirs[j].roles.keys() & ours[i].roles.keys()
        to, of = ({place[name] for role in common for name in layer.roles[role][0]} for place, layer in ((their_place, theirs[j]), (our_place, ours[i])))
        if len(to) == len(of) == 1 and to <= whole:
            anchors[to.pop()] = of.pop()
    distrusted, mapped = ({their_place[name] for j in each for name in theirs[j].names} for each in (trust.distrusted, trust.mapped))
    return Trust(trust.as_a_whole, anchors, distrusted, trust.numbers, mapped, trust.new_names)
