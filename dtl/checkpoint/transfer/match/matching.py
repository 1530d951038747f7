"""What a planner hands on: which source tensor goes to which target tensor, why, and what it would not decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dtl.checkpoint.transfer.layers.units import Key, Shape, Unit


@dataclass(frozen=True)
class Match:
    """One target tensor's source.

    `transform`: the named function of `dtl.checkpoint.transfer.adapt` that makes it fit ("" for a plain copy).
    `evidence`: name, unique-shape, structure, tree+number, pattern, graph, order or map. `margin`: by how much the best alignment
    without this pair is worse (score units of `dtl.checkpoint.transfer.match.align`), where an alignment decided.
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
        return tuple(key if isinstance(key, str) else " + ".join(key) for key, _ in self.alternatives)

    def line(self, target: str) -> str:
        """The line of a map that takes the first alternative."""
        key, transform = self.alternatives[0]
        source = key if isinstance(key, str) else f"[{', '.join(key)}]"
        plain = transform in ("", "fuse" if isinstance(key, tuple) else "")
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
    """`refusals` stop the transfer whatever the options say; `flags` only while `on_ambiguous` is `error`."""

    view: str
    matches: dict[str, Match] = field(default_factory=dict)
    flags: dict[str, Flag] = field(default_factory=dict)
    clashes: list[Clash] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head_rows: tuple[tuple[int, ...], ...] | None = None
    """Where a map chose the head's rows: for each class of the target the rows of the source's head."""

    def pair(self, source: Unit, target: Unit, *, transform: str = "", evidence: str, margin: float | None = None) -> None:
        """Pair the tensors of two units by role. Shapes decide per tensor whether the transform is needed; where one is and there
        is none, the whole layer is in doubt."""
        for role in () if transform else target.roles.keys() & source.roles.keys():
            (key, shape), (target_key, target_shape) = source.roles[role], target.roles[role]
            if shape != target_shape and isinstance(key, str) and isinstance(target_key, str):
                clash = Clash(target_key, target_shape, key, shape)
                self.clashes.append(clash)
                self.flag(target, f"the layers fit, but not {clash}", [(source, "")])
                return
        for role, (target_key, target_shape) in target.roles.items():
            if role not in source.roles:
                continue
            key, shape = source.roles[role]
            needed = transform if shape != target_shape or isinstance(key, tuple) or isinstance(target_key, tuple) else ""
            if isinstance(target_key, tuple):
                for part, name in enumerate(target_key):
                    self.matches[name] = Match(key, f"split_{part}_of_{len(target_key)}", evidence, margin)
            else:
                self.matches[target_key] = Match(key, needed, evidence, margin)

    def flag(self, unit: Unit, reason: str, options: Iterable[tuple[Unit, str]] = ()) -> None:
        """Leave a layer undecided. `options`: source layers that would fit, each with its transform; told tensor by tensor, by role."""
        options = list(options)
        for role, (names, shape) in unit.roles.items():
            fitting = [(source.roles[role], transform) for source, transform in options if role in source.roles]
            for part, name in enumerate(names if isinstance(names, tuple) else (names,)):
                split = f"split_{part}_of_{len(names)}" if isinstance(names, tuple) else ""
                found = [(key, split or ("" if have == shape else transform)) for (key, have), transform in fitting]
                self.flags[name] = Flag(reason, tuple(found))
