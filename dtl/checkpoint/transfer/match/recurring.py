"""Names that recur: how the last words of one network's names translate into the other's, learned from pairs that stand.

RegNet's `f.a.0` is `conv1.conv` in every block where shapes tell; so it is in the first block of a stage, where the shortcut
has the same shape. Nothing here rests on the order of registration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import product, takewhile

from dtl.checkpoint.transfer.layers.tree import loose_signature
from dtl.checkpoint.transfer.layers.units import WEIGHTED, Unit

_LENGTHS = tuple(product((1, 2, 3), repeat=2))
_LEAST = 2
"""Pairs that must show a translation before it is believed."""


def match_recurring(source: Mapping[int, Unit], target: Mapping[int, Unit], base: Mapping[int, int]) -> dict[int, int]:
    """Target -> source for units outside of `base` (target -> source, certain), where exactly one source unit of the shape has
    the last words that stand for the target's in every pair of `base` that has them, and nobody else asks for it.

    Words tell layers of one block apart, not blocks: another pair of the same two blocks must stand already.
    """
    if any(unit.flat for unit in (*source.values(), *target.values())):
        return {}
    learned = {lengths: _translation(source, target, base, *lengths) for lengths in _LENGTHS}
    taken = set(base.values())
    our_blocks, their_blocks = _blocks(list(source.values())), _blocks(list(target.values()))
    standing = {(our_blocks[i], their_blocks[j]) for j, i in base.items()}
    options: dict[object, list[int]] = defaultdict(list)
    for i, unit in source.items():
        if i not in taken:
            options[loose_signature(unit)].append(i)
    votes: dict[int, int] = {}
    for j, unit in target.items():
        if j in base:
            continue
        said: set[int] = set()
        for theirs in (1, 2, 3):
            # The fewest words that translate: more of them would hold the names of the blocks that they were learned from.
            tail = _tail(unit.path, theirs)
            found = next(((ours, learned[ours, theirs][tail]) for ours in (1, 2, 3) if tail in learned[ours, theirs]), None)
            if found is None:
                continue
            fits = [i for i in options[loose_signature(unit)] if _tail(source[i].path, found[0]) == found[1]]
            if len(fits) == 1:
                said.add(fits[0])
        if len(said) == 1 and (our_blocks[next(iter(said))], their_blocks[j]) in standing:
            votes[j] = said.pop()
    asked = Counter(votes.values())
    return {j: i for j, i in votes.items() if asked[i] == 1}


def _translation(source: Mapping[int, Unit], target: Mapping[int, Unit], base: Mapping[int, int], ours: int, theirs: int) -> dict[str, str]:
    """Last words in the target -> last words in the source, where each always stands for the other and for nothing else."""
    pairs = Counter((_tail(target[j].path, theirs), _tail(source[i].path, ours)) for j, i in base.items())
    forward, backward = Counter(b for b, _ in pairs), Counter(a for _, a in pairs)
    return {b: a for (b, a), count in pairs.items() if count >= _LEAST and forward[b] == backward[a] == 1}


def _blocks(units: Sequence[Unit]) -> dict[int, str]:
    """Unit -> the smallest module around it that holds more than one convolution or linear layer ("" where that is the network)."""
    weights = Counter(path for unit in units if unit.kind in WEIGHTED for path in _above(unit.path))
    return {unit.index: next((path for path in _above(unit.path) if weights[path] > 1), "") for unit in units}


def _above(path: str) -> list[str]:
    """The modules around a layer, innermost first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def _tail(path: str, words: int) -> str:
    return ".".join(path.split(".")[-words:])


def match_leftovers(source: Sequence[Unit], target: Sequence[Unit], certain: Mapping[int, int], *, whole: bool = False) -> dict[int, int]:
    """Pairs of units that are each the only one of their shape left in blocks whose other layers are each other's.

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


def _members(units: Sequence[Unit]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for unit in units:
        for path in _above(unit.path):
            found[path].append(unit.index)
    return found


def _common_parent(paths: Sequence[str]) -> str:
    parents = [path.split(".")[:-1] for path in paths]
    same = takewhile(lambda words: len(set(words)) == 1, zip(*parents))
    return ".".join(words[0] for words in same)


def _block_of_size(members: Mapping[str, list[int]], path: str, size: int) -> list[int]:
    """The units of the smallest module at or around `path` that holds so many; [] where there is none."""
    while path:
        if len(members.get(path, ())) >= size:
            return members[path] if len(members[path]) == size else []
        path = path.rpartition(".")[0]
    return []


def _by_signature(units: Sequence[Unit], indices: Sequence[int]) -> dict[object, list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for index in indices:
        found[loose_signature(units[index])].append(index)
    return found
