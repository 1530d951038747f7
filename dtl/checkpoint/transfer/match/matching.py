"""The result of a planner: which source tensor goes to which target tensor, why, and what it would not decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isqrt

from dtl.checkpoint.transfer.layers.layer import WEIGHTED, Key, Layer, Shape, num_elements, squeezed


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


@dataclass(frozen=True)
class Flag:
    """A target tensor that was not decided. `alternatives`: source tensors that would fit, best first, each with its transform."""

    reason: str
    alternatives: tuple[tuple[Key, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(" + ".join(key) for key, _ in self.alternatives)

    def line(self, target: str) -> str:
        """The line of a map that takes the first alternative."""
        key, transform = self.alternatives[0]
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
        return f"{self.target} {list(self.target_shape)} against {self.source} {list(self.source_shape)}"


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
                self.flag(target, f"the layers fit, but not {clash}", [(source, "")])
                return
        for role, (target_key, target_shape) in target.roles.items():
            if role not in source.roles:
                continue
            key, shape = source.roles[role]
            needed = transform if shape != target_shape or len(key) > 1 else ""
            if len(target_key) > 1:
                for part, name in enumerate(target_key):
                    self.matches[name] = Match(key, f"split_{part}_of_{len(target_key)}", evidence, margin)
            else:
                self.matches[target_key[0]] = Match(key, needed, evidence, margin)

    def flag(self, layer: Layer, reason: str, options: Iterable[tuple[Layer, str]] = ()) -> None:
        """Leave a layer undecided. `options`: source layers that would fit, each with its transform; listed tensor by tensor, by role."""
        options = list(options)
        for role, (names, shape) in layer.roles.items():
            fitting = [(source.roles[role], transform) for source, transform in options if role in source.roles]
            for part, name in enumerate(names):
                split = f"split_{part}_of_{len(names)}" if len(names) > 1 else ""
                found = [(key, split or ("" if have == shape else transform)) for (key, have), transform in fitting]
                self.flags[name] = Flag(reason, tuple(found))


IMAGE_CHANNELS = 4
"""A first convolution is one of images if either side has at most this many input channels."""


def layer_transform(source: Layer, target: Layer, *, first: bool) -> str | None:
    """The transform that makes `source` fit `target`: "" for equal shapes, None where there is none.

    `first`: the target is the network's first convolution, whose input channels may differ. Every role that both have must
    agree; the transform is that of the main tensor.
    """
    transform = ""
    for role, (_, shape) in target.roles.items():
        if role not in source.roles:
            continue
        have = source.roles[role][1]
        if have == shape:
            continue
        how = tensor_transform(have, shape, kinds=(source.kind, target.kind), name=target.path, first=first and role == "weight")
        if how is None:
            return None
        transform = how
    return transform


def tensor_transform(have: Shape, want: Shape, *, kinds: tuple[str, str], name: str, first: bool) -> str | None:
    """The transform from shape `have` to shape `want`, by what kind of layer and what name it is; None where there is none."""
    weighted = kinds[0] in WEIGHTED and kinds[1] in WEIGHTED
    if weighted:
        return _weight_transform(have, want, first=first, patches="patch" in name or "proj" in name.split(".")[-1])
    if squeezed(have) == squeezed(want):
        return "squeeze"
    lowered = name.lower()
    if "pos" in lowered and "relative" not in lowered and is_position_table(have, want):
        return "resize_position_embedding"
    if "relative_position_bias_table" in lowered and is_relative_table(have, want):
        return "resize_relative_table"
    return None


def _weight_transform(have: Shape, want: Shape, *, first: bool, patches: bool) -> str | None:
    if squeezed(have) == squeezed(want) and have[0] == want[0]:
        return "squeeze"
    if {len(have), len(want)} == {2, 4} and have[0] == want[0] and num_elements(have) == num_elements(want):
        return "reshape_kernel"
    if len(have) == len(want) == 4 and have[0] == want[0] and first:
        if have[2:] == want[2:] and min(have[1], want[1]) <= IMAGE_CHANNELS:
            return "stem_channels"
        if patches and have[1] == want[1] and have[2] == have[3] and want[2] == want[3]:
            return "resize_patches"
    return None


def is_position_table(have: Shape, want: Shape) -> bool:
    """[1, N, D] both, or [1, D, H, W] both, of one width."""
    if len(have) == len(want) == 3:
        return have[0] == want[0] == 1 and have[2] == want[2] and _grid(have[1]) is not None and _grid(want[1]) is not None
    return len(have) == len(want) == 4 and have[:2] == want[:2] and have[0] == 1


def _grid(num_tokens: int) -> int | None:
    """The side of the square grid behind a row of tokens, with up to two tokens more (class, distillation)."""
    return next((isqrt(num_tokens - extra) for extra in (0, 1, 2) if isqrt(num_tokens - extra) ** 2 == num_tokens - extra), None)


def is_relative_table(have: Shape, want: Shape) -> bool:
    """[(2s-1)^2, heads], the same number of heads."""
    if not (len(have) == len(want) == 2 and have[1] == want[1]):
        return False
    return all(isqrt(rows) ** 2 == rows and isqrt(rows) % 2 == 1 for rows in (have[0], want[0]))
