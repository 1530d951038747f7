"""A view of two networks that needs no order: modules are matched by what they contain, and by the numbers in their names.

Two subtrees with the same bag of layer shapes are the same kind of block; where there are as many on both sides, the numbers
in the names (`layer2.0`, `blocks.3`) say which is which. Numbers are only believed where names first differ in a number, and
where the numbers of all siblings look like an index: those of a hash do not.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dtl.checkpoint.transfer.layers.units import WEIGHTED, Unit, squeezed

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

    def tell_apart(self, left: str, right: str) -> bool:
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
        return ordered if all(self.tell_apart(a, b) for a, b in itertools.pairwise(ordered)) else None


def loose_signature(unit: Unit) -> tuple[str, tuple[int, ...]]:
    """What two layers must share to be the same up to size-1 dimensions: a linear layer and a 1x1 convolution do."""
    if unit.kind in WEIGHTED:
        return "weighted", squeezed(unit.shape) or unit.shape
    if unit.kind in ("param", "vector"):
        return "param", squeezed(unit.shape)
    return unit.kind, unit.shape


def match_trees(
    source: Sequence[Unit],
    target: Sequence[Unit],
    *,
    target_rank: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Target unit -> source unit, by content and numbers alone. `target_rank`: when each target unit is used; numbers that
    contradict it are not believed."""
    if any(unit.flat for unit in (*source, *target)):
        return {}
    return _Trees(source, target, target_rank).match()


class _Trees:
    def __init__(self, source: Sequence[Unit], target: Sequence[Unit], target_rank: Mapping[int, int] | None) -> None:
        self.ours = {unit.index: unit for unit in source}
        self.theirs = {unit.index: unit for unit in target}
        self.our_trees, self.their_trees = _subtrees(source), _subtrees(target)
        self.our_bags = {path: _bag(members, self.ours) for path, members in self.our_trees.items()}
        self.their_bags = {path: _bag(members, self.theirs) for path, members in self.their_trees.items()}
        self.our_numbers = Numbers([unit.path for unit in source])
        self.their_numbers = Numbers([unit.path for unit in target])
        self.rank = target_rank
        self.found: dict[int, int] = {}

    def match(self) -> dict[int, int]:
        self._inside(frozenset(self.ours), frozenset(self.theirs))
        return self.found

    def _inside(self, ours: frozenset[int], theirs: frozenset[int]) -> None:
        """Match the blocks inside two sets of units, largest first, then what is left over one by one."""
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


def _subtrees(units: Sequence[Unit]) -> dict[str, frozenset[int]]:
    """Module path -> its units; of a chain of modules with equal content only the topmost."""
    members: dict[str, list[int]] = defaultdict(list)
    for unit in units:
        parts = unit.path.split(".")
        for depth in range(1, len(parts) + 1):
            members[".".join(parts[:depth])].append(unit.index)
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


def _bag(members: frozenset[int], units: Mapping[int, Unit]) -> Bag:
    """What a module learns. Tables of the architecture do not count: one library stores Swin's index tables, the other does not."""
    return frozenset(Counter(loose_signature(units[i]) for i in members if units[i].kind != "buffer").items())
