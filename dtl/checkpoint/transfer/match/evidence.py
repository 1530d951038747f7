"""What a planner gives, which source tensor goes to which target tensor and why; and reasons to believe a pair that do not rest on the order
of registration."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product, takewhile

from dtl.checkpoint.transfer.layers.dataflow import Target, links_by_dataflow, links_by_names, links_by_neighbours
from dtl.checkpoint.transfer.layers.layer import WEIGHTED, Key, Layer, Shape, loose_signature, split_transforms


@dataclass(frozen=True)
class Match:
    """One target tensor's source.

    `transform`: the named function of `dtl.checkpoint.transfer.adapt` that makes it fit ("" for a plain copy).
    `evidence`: name, unique-shape, structure, tree+number, pattern, graph, order or map. `margin`: by how much the best alignment
    without this pair is worse (in the scores of `dtl.checkpoint.transfer.match.alignment`), where an alignment decided.
    """

    source: Key
    transform: str = ""
    evidence: str = "name"
    margin: float | None = None


NEW_NAME = "most names match, but this one is new: it may be a new layer of this shape, or a renamed one"


@dataclass(frozen=True)
class Flag:
    """A target tensor that was not decided. `alternatives`: source tensors that would fit, best first, each with its transform."""

    reason: str
    alternatives: tuple[tuple[Key, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(" + ".join(key) for key, _ in self.alternatives)

    def line(self, target: str, number: int = 0) -> str:
        """The line of a map that takes one of the alternatives, by default the first."""
        key, transform = self.alternatives[number]
        source = key[0] if len(key) == 1 else f"[{', '.join(key)}]"
        plain = transform in ("", "fuse" if len(key) > 1 else "")
        return f"{target}: {source}" if plain else f"{target}: {{source: {source}, transform: {transform}}}"


@dataclass(frozen=True)
class Clash:
    """A pair that names or positions ask for and shapes forbid."""

    target: str
    target_shape: Shape
    source: str
    source_shape: Shape

    def __str__(self) -> str:
        return f"{self.target} {list(self.target_shape)} here, {self.source} {list(self.source_shape)} in the source"


@dataclass
class Matching:
    """`refusals` stop the transfer whatever the options; `flags` only while `on_ambiguous` is `error`."""

    view: str
    matches: dict[str, Match] = field(default_factory=dict)
    flags: dict[str, Flag] = field(default_factory=dict)
    clashes: list[Clash] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head_rows: tuple[tuple[int, ...], ...] | None = None
    """Where a map chose the head's rows: for each class of the target the rows of the source's head."""

    def pair(self, source: Layer, target: Layer, *, transform: str = "", evidence: str, margin: float | None = None) -> None:
        """Pair the tensors of two layers by role. Shapes decide per tensor whether the transform is needed; where one is and there
        is none, the whole layer is in doubt."""
        for role in () if transform else target.roles.keys() & source.roles.keys():
            (key, shape), (target_key, target_shape) = source.roles[role], target.roles[role]
            if shape != target_shape and len(key) == len(target_key) == 1:
                clash = Clash(target_key[0], target_shape, key[0], shape)
                self.clashes.append(clash)
                self.flag(target, f"the layers match, but not all of their shapes: {clash}", [(source, "")])
                return
        for role, (target_key, target_shape) in target.roles.items():
            if role not in source.roles:
                continue
            key, shape = source.roles[role]
            needed = transform if shape != target_shape or len(key) > 1 else ""
            if len(target_key) > 1:
                for split, name in zip(split_transforms(len(target_key)), target_key):
                    self.matches[name] = Match(key, split, evidence, margin)
            else:
                self.matches[target_key[0]] = Match(key, needed, evidence, margin)

    def flag(self, layer: Layer, reason: str, options: Iterable[tuple[Layer, str]] = ()) -> None:
        """Leave a layer undecided. `options`: source layers that would fit, each with its transform; listed tensor by tensor, by role."""
        options = list(options)
        for role, (names, shape) in layer.roles.items():
            fitting = [(source.roles[role], transform) for source, transform in options if role in source.roles]
            for name, split in zip(names, split_transforms(len(names)) if len(names) > 1 else ("",)):
                found = [(key, split or ("" if have == shape else transform)) for (key, have), transform in fitting]
                self.flags[name] = Flag(reason, tuple(found))


_SYNONYMS = {
    "bn": "norm",
    "ln": "norm",
    "batchnorm": "norm",
    "layernorm": "norm",
    "shortcut": "downsample",
    "fc": "linear",
    "classifier": "linear",
    "head": "linear",
}


@lru_cache(maxsize=100_000)
def words(path: str) -> tuple[str, ...]:
    """The words and numbers of a dotted path, common synonyms made one."""
    return tuple(_SYNONYMS.get(word.lower(), word.lower()) for word in re.findall(r"[A-Za-z]+|\d+", path))


@lru_cache(maxsize=1_000_000)
def likeness(left: str, right: str) -> float:
    """0..1: twice the longest common subsequence of words, over all words. Whole words only: `conv1` is not half `conv2`."""
    a, b = words(left), words(right)
    if not a or not b or left[0] == "#" or right[0] == "#":
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(a) + len(b))


LIKE = 0.75
"""Names at least this similar count as the same name..."""
CLEARLY = 0.08
"""...if no other layer of the shape comes this near, on either side."""


class NameEvidence:
    """Which source layer's name fits a target layer clearly best among all layers of its shape."""

    def __init__(self, source: Sequence[Layer], target: Sequence[Layer], *, distrusted: Collection[int]) -> None:
        self.source = {layer.index: layer for layer in source}
        self.target = {layer.index: layer for layer in target}
        self.ours, self.theirs = defaultdict(list), defaultdict(list)
        self.distrusted = frozenset(distrusted)
        for layer in source:
            self.ours[loose_signature(layer)].append(layer.index)
        for layer in target:
            self.theirs[loose_signature(layer)].append(layer.index)

    def like(self, i: int, j: int) -> float:
        if j in self.distrusted:
            return 0.0
        return likeness(self.source[i].path, self.target[j].path)

    def best(self, j: int) -> int | None:
        """The source layer of the same shape whose name fits `j` clearly best, both ways; None where there is none such."""
        signature = loose_signature(self.target[j])
        row = sorted(((self.like(i, j), i) for i in self.ours[signature]), key=lambda pair: (-pair[0], pair[1]))
        if not row or row[0][0] < LIKE or (len(row) > 1 and row[0][0] - row[1][0] < CLEARLY):
            return None
        top, i = row[0]
        if any(other != j and top - self.like(i, other) < CLEARLY for other in self.theirs[signature]):
            return None
        return i

    def better(self, i: int, j: int) -> list[int]:
        """Source layers of the same shape whose names fit `j` clearly better than `i`'s does."""
        bar = max(LIKE, self.like(i, j) + CLEARLY)
        return [a for a in self.ours[loose_signature(self.target[j])] if a != i and self.like(a, j) >= bar]


def unique_shapes(source: Sequence[Layer], target: Sequence[Layer]) -> dict[int, int]:
    """Target -> source, where both networks have exactly one layer of that shape."""
    ours = Counter(loose_signature(layer) for layer in source)
    theirs = Counter(loose_signature(layer) for layer in target)
    where = {loose_signature(layer): layer.index for layer in source}
    return {
        layer.index: where[loose_signature(layer)]
        for layer in target
        if ours[loose_signature(layer)] == theirs[loose_signature(layer)] == 1 and layer.kind != "buffer"
    }


_LENGTHS = tuple(product((1, 2, 3), repeat=2))
_LEAST = 2
"""Pairs that must show a translation before it is believed."""


def match_recurring(source: Mapping[int, Layer], target: Mapping[int, Layer], base: Mapping[int, int]) -> dict[int, int]:
    """Target -> source for layers outside of `base` (target -> source, certain), where exactly one source layer of the shape has
    the last words that stand for the target's in every pair of `base` that has them, and nobody else asks for it.

    Words tell layers of one block apart, not blocks: another pair of the same two blocks must stand already.
    """
    if any(layer.flat for layer in (*source.values(), *target.values())):
        return {}
    learned = {lengths: _translation(source, target, base, *lengths) for lengths in _LENGTHS}
    taken = set(base.values())
    our_blocks, their_blocks = _blocks(list(source.values())), _blocks(list(target.values()))
    standing = {(our_blocks[i], their_blocks[j]) for j, i in base.items()}
    options: dict[object, list[int]] = defaultdict(list)
    for i, layer in source.items():
        if i not in taken:
            options[loose_signature(layer)].append(i)
    votes: dict[int, int] = {}
    for j, layer in target.items():
        if j in base:
            continue
        voted: set[int] = set()
        for theirs in (1, 2, 3):
            # The fewest words that translate: more of them would hold the names of the blocks that they were learned from.
            tail = _tail(layer.path, theirs)
            found = next(((ours, learned[ours, theirs][tail]) for ours in (1, 2, 3) if tail in learned[ours, theirs]), None)
            if found is None:
                continue
            fits = [i for i in options[loose_signature(layer)] if _tail(source[i].path, found[0]) == found[1]]
            if len(fits) == 1:
                voted.add(fits[0])
        if len(voted) == 1 and (our_blocks[next(iter(voted))], their_blocks[j]) in standing:
            votes[j] = voted.pop()
    asked = Counter(votes.values())
    return {j: i for j, i in votes.items() if asked[i] == 1}


def _translation(source: Mapping[int, Layer], target: Mapping[int, Layer], base: Mapping[int, int], ours: int, theirs: int) -> dict[str, str]:
    """Last words in the target -> last words in the source, where each always stands for the other and for nothing else."""
    pairs = Counter((_tail(target[j].path, theirs), _tail(source[i].path, ours)) for j, i in base.items())
    forward, backward = Counter(b for b, _ in pairs), Counter(a for _, a in pairs)
    return {b: a for (b, a), count in pairs.items() if count >= _LEAST and forward[b] == backward[a] == 1}


def _blocks(layers: Sequence[Layer]) -> dict[int, str]:
    """Layer -> the smallest module around it that holds more than one convolution or linear layer ("" where that is the network)."""
    weights = Counter(path for layer in layers if layer.kind in WEIGHTED for path in _above(layer.path))
    return {layer.index: next((path for path in _above(layer.path) if weights[path] > 1), "") for layer in layers}


def _above(path: str) -> list[str]:
    """The modules around a layer, innermost first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def _tail(path: str, words: int) -> str:
    return ".".join(path.split(".")[-words:])


def match_leftovers(source: Sequence[Layer], target: Sequence[Layer], certain: Mapping[int, int], *, whole: bool = False) -> dict[int, int]:
    """Pairs of layers that are each the only one of their shape left in blocks whose other layers are each other's.

    `whole`: only where nothing of the two blocks is left then. A layer that was replaced by another of its shape looks the same.
    """
    back = {i: j for j, i in certain.items()}
    ours, theirs = _members(source), _members(target)
    found: dict[int, int] = {}
    for path, inside in sorted(theirs.items(), key=lambda item: len(item[1])):
        paired = [certain[j] for j in inside if j in certain]
        if len(paired) < 3 or len(paired) == len(inside):
            continue
        block = _block_of_size(ours, _common_parent([source[i].path for i in paired]), len(inside))
        if not block or not path or any(back.get(i, inside[0]) not in inside for i in block):
            continue
        left_a = _by_signature(source, [i for i in block if i not in back and i not in found.values()])
        left_b = _by_signature(target, [j for j in inside if j not in certain and j not in found])
        pairs = {b[0]: left_a[key][0] for key, b in left_b.items() if len(b) == 1 and len(left_a.get(key, ())) == 1}
        if not whole or len(pairs) == sum(map(len, left_a.values())) == sum(map(len, left_b.values())):
            found.update(pairs)
    return found


def _members(layers: Sequence[Layer]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for layer in layers:
        for path in _above(layer.path):
            found[path].append(layer.index)
    return found


def _common_parent(paths: Sequence[str]) -> str:
    parents = [path.split(".")[:-1] for path in paths]
    same = takewhile(lambda words: len(set(words)) == 1, zip(*parents))
    return ".".join(words[0] for words in same)


def _block_of_size(members: Mapping[str, list[int]], path: str, size: int) -> list[int]:
    """The layers of the smallest module at or around `path` that holds so many; [] where there is none."""
    while path:
        if len(members.get(path, ())) >= size:
            return members[path] if len(members[path]) == size else []
        path = path.rpartition(".")[0]
    return []


def _by_signature(layers: Sequence[Layer], indices: Sequence[int]) -> dict[object, list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for index in indices:
        found[loose_signature(layers[index])].append(index)
    return found


Part = tuple[int | str, ...]
Bag = frozenset[tuple[tuple[str, tuple[int, ...]], int]]
"""Kinds and shapes of a module's layers, with their numbers."""


@lru_cache(maxsize=200_000)
def _tokens(part: str) -> Part:
    """Numbers, and what stands between them. A part that is one letter counts as its place in the alphabet (RegNet's a, b, c)."""
    if len(part) == 1 and "a" <= part <= "f":
        return (ord(part) - ord("a"),)
    return tuple(int(token) if token.isdigit() else token for token in re.findall(r"\d+|[^\d]+", part))


@lru_cache(maxsize=200_000)
def _path(path: str) -> tuple[Part, ...]:
    return tuple(_tokens(part) for part in path.split("."))


def _natural(path: str) -> tuple[tuple[tuple[int, int, str], ...], ...]:
    return tuple(tuple((0, t, "") if isinstance(t, int) else (1, 0, t) for t in part) for part in _path(path))


class Numbers:
    """The families of numbered siblings of one network, and whether each looks like an index."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.families: dict[tuple[object, ...], set[int]] = defaultdict(set)
        for path in paths:
            parts = _path(path)
            for depth, part in enumerate(parts):
                for at, token in enumerate(part):
                    if isinstance(token, int):
                        self.families[self._family(parts, depth, at)].add(token)

    @staticmethod
    def _family(parts: tuple[Part, ...], depth: int, at: int) -> tuple[object, ...]:
        return parts[:depth], parts[depth][:at], parts[depth][at + 1 :]

    def distinguishes(self, left: str, right: str) -> bool:
        """Whether the first difference of two paths is a number of a family that looks like an index."""
        a, b = _path(left), _path(right)
        depth = next((d for d, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if depth is None:
            return False
        x, y = a[depth], b[depth]
        if len(x) != len(y):
            return False
        differing = [at for at, (s, t) in enumerate(zip(x, y)) if s != t]
        if len(differing) != 1 or not (isinstance(x[differing[0]], int) and isinstance(y[differing[0]], int)):
            return False
        family = self.families[self._family(a, depth, differing[0])]
        # Sequential numbers skip layers without tensors; names with a number in them (conv1, bn0) start at 0, 1 or 2.
        return max(family) <= (5 * len(family) + 8 if len(x) == 1 else len(family) + 3)

    def place(self, path: str) -> tuple[int, int] | None:
        """(rank among its numbered siblings, their number) of a module whose own name ends in an index; None for others."""
        parts = _path(path)
        depth, at = len(parts) - 1, len(parts[-1]) - 1
        if not isinstance(parts[depth][at], int):
            return None
        numbers = sorted(self.families[self._family(parts, depth, at)])
        return numbers.index(int(parts[depth][at])), len(numbers)

    def ranked(self, paths: Sequence[str]) -> list[str] | None:
        """Paths by their numbers, or None where words tell two of them apart."""
        ordered = sorted(paths, key=_natural)
        return ordered if all(self.distinguishes(a, b) for a, b in itertools.pairwise(ordered)) else None


def match_trees(
    source: Sequence[Layer],
    target: Sequence[Layer],
    *,
    target_rank: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Target layer -> source layer, by content and numbers alone. `target_rank`: when each target layer is used; numbers that
    contradict it are not believed."""
    if any(layer.flat for layer in (*source, *target)):
        return {}
    return _Trees(source, target, target_rank).match()


class _Trees:
    def __init__(self, source: Sequence[Layer], target: Sequence[Layer], target_rank: Mapping[int, int] | None) -> None:
        self.ours = {layer.index: layer for layer in source}
        self.theirs = {layer.index: layer for layer in target}
        self.our_trees, self.their_trees = _subtrees(source), _subtrees(target)
        self.our_bags = {path: _bag(members, self.ours) for path, members in self.our_trees.items()}
        self.their_bags = {path: _bag(members, self.theirs) for path, members in self.their_trees.items()}
        self.our_numbers = Numbers([layer.path for layer in source])
        self.their_numbers = Numbers([layer.path for layer in target])
        self.rank = target_rank
        self.found: dict[int, int] = {}

    def match(self) -> dict[int, int]:
        self._inside(frozenset(self.ours), frozenset(self.theirs))
        return self.found

    def _inside(self, ours: frozenset[int], theirs: frozenset[int]) -> None:
        """Match the blocks inside two sets of layers, largest first, then what is left over one by one."""
        groups_a, groups_b = defaultdict(list), defaultdict(list)
        for path, members in self.our_trees.items():
            if len(members) > 1 and members < ours:
                groups_a[self.our_bags[path]].append(path)
        for path, members in self.their_trees.items():
            if len(members) > 1 and members < theirs:
                groups_b[self.their_bags[path]].append(path)
        shared = (groups_a.keys() & groups_b.keys()) - {frozenset()}
        for bag in sorted(shared, key=lambda bag: (-sum(n for _, n in bag), repr(sorted(bag)))):
            a = [path for path in groups_a[bag] if self.our_trees[path] <= ours]
            b = [path for path in groups_b[bag] if self.their_trees[path] <= theirs]
            for x, y in self._zip(a, b):
                ours, theirs = ours - self.our_trees[x], theirs - self.their_trees[y]
                self._inside(self.our_trees[x], self.their_trees[y])
        self._leaves(ours, theirs)

    def _zip(self, ours: list[str], theirs: list[str]) -> list[tuple[str, str]]:
        if not ours or len(ours) != len(theirs):
            return []
        if len(ours) == 1:
            # The only two of their content, but the first of four stages here and the second of four there: not the same.
            place, other = self.our_numbers.place(ours[0]), self.their_numbers.place(theirs[0])
            if place and other and place[1] == other[1] and place[0] != other[0]:
                return []
            # Two blocks here and there, one block here and there: a block may as well have moved from the one stage to the other.
            elsewhere = not place or not other or place[0] != other[0]
            if elsewhere and (_resembles(ours[0], self.our_trees, self.our_bags) or _resembles(theirs[0], self.their_trees, self.their_bags)):
                return []
        a = self.our_numbers.ranked(ours)
        b = self.their_numbers.ranked(theirs)
        if a is None or b is None:
            return []
        if self.rank is not None:
            used = [min((self.rank[i] for i in self.their_trees[path] if i in self.rank), default=-1) for path in b]
            if -1 not in used and used != sorted(used):
                return []
        return list(zip(a, b))

    def _leaves(self, ours: frozenset[int], theirs: frozenset[int]) -> None:
        left, right = defaultdict(list), defaultdict(list)
        for i in sorted(ours):
            left[loose_signature(self.ours[i])].append(i)
        for j in sorted(theirs):
            right[loose_signature(self.theirs[j])].append(j)
        for key in left.keys() & right.keys():
            a, b = left[key], right[key]
            if len(a) == len(b) == 1:
                self.found[b[0]] = a[0]
                continue
            by_path_a = {self.ours[i].path: i for i in a}
            by_path_b = {self.theirs[j].path: j for j in b}
            ranked_a = self.our_numbers.ranked(list(by_path_a))
            ranked_b = self.their_numbers.ranked(list(by_path_b))
            if len(a) != len(b) or ranked_a is None or ranked_b is None:
                continue
            pairs = [(by_path_b[y], by_path_a[x]) for x, y in zip(ranked_a, ranked_b)]
            if self.rank is not None:
                used = [self.rank[j] for j, _ in pairs if j in self.rank]
                if used != sorted(used):
                    continue
            self.found.update(pairs)


def _subtrees(layers: Sequence[Layer]) -> dict[str, frozenset[int]]:
    """Module path -> its layers; of a chain of modules with equal content only the topmost."""
    members: dict[str, list[int]] = defaultdict(list)
    for layer in layers:
        parts = layer.path.split(".")
        for depth in range(1, len(parts) + 1):
            members[".".join(parts[:depth])].append(layer.index)
    top: dict[tuple[int, ...], str] = {}
    for path in sorted(members, key=lambda path: (path.count("."), path)):
        top.setdefault(tuple(sorted(members[path])), path)
    return {path: frozenset(content) for content, path in top.items()}


def _resembles(path: str, trees: Mapping[str, frozenset[int]], bags: Mapping[str, Bag]) -> bool:
    """Whether another module holds the same layers in other numbers."""
    layers = {layer for layer, _ in bags[path]}
    return any(
        bags[other] != bags[path] and not members & trees[path] and {layer for layer, _ in bags[other]} == layers
        for other, members in trees.items()
        if len(members) > 1
    )


def _bag(members: frozenset[int], layers: Mapping[int, Layer]) -> Bag:
    """What a module learns. Tables of the architecture do not count: one library stores Swin's index tables, the other does not."""
    return frozenset(Counter(loose_signature(layers[i]) for i in members if layers[i].kind != "buffer").items())


# ---- norms that the target does not have


_PARTS = ("weight", "bias", "running_mean", "running_var")


def fold_orphans(matches: Mapping[str, Match], source: Sequence[Layer], target: Target) -> dict[str, Match]:
    """New matches for weight and bias of each target convolution whose source has a norm behind it and which itself has none.

    Only plain copies are folded, and only where the target has a bias to take the norm's shift.
    """
    used = {name for match in matches.values() for name in match.source}
    layers = _layers_of_norms(source)
    normed = _normed_layers(target)
    receivers = {match.source: name for name, match in matches.items() if not match.transform}
    by_weight = {layer.roles["weight"][0]: layer for layer in target.layers if layer.kind in WEIGHTED and "weight" in layer.roles}
    by_index = {layer.index: layer for layer in source}
    folded: dict[str, Match] = {}
    for norm in source:
        owner = by_index.get(layers.get(norm.index, -1))
        if owner is not None and owner.index > norm.index:
            continue  # registered before its layer: it may act before it too
        if norm.kind != "bn" or owner is None or used.intersection(norm.names) or not all(part in norm.roles for part in _PARTS):
            continue
        taker = by_weight.get((receivers.get(owner.roles["weight"][0], ""),))
        if taker is None or taker.index in normed or "bias" not in taker.roles:
            continue
        keys = [owner.roles["weight"][0], *(norm.roles[part][0] for part in _PARTS)]
        if "bias" in owner.roles:
            keys.append(owner.roles["bias"][0])
        parts = tuple(name for key in keys for name in key)
        weight, bias = taker.roles["weight"][0][0], taker.roles["bias"][0][0]
        evidence = matches[weight].evidence
        folded[weight] = Match(parts, "fold_norm_weight", evidence)
        folded[bias] = Match(parts, "fold_norm_bias", evidence)
    return folded


def _layers_of_norms(source: Sequence[Layer]) -> dict[int, int]:
    named = links_by_names(source)
    if named or not all(layer.flat for layer in source):
        return named
    links = links_by_neighbours(source)
    return {norm: other for norm, found in links.items() for side, other in found if side == "post"}


def _normed_layers(target: Target) -> Collection[int]:
    """Target layers that have a norm of their own behind them."""
    links = links_by_dataflow(target.layers, target.dataflow) if target.dataflow else links_by_neighbours(target.layers)
    return {other for found in links.values() for side, other in found if side == "post"}
