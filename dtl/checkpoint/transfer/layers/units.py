"""A list of tensors seen as a list of layers: one `Unit` for a convolution, a linear layer, a norm with all of its tensors.

Everything here works on names and shapes alone. Weights are aligned unit by unit, never tensor by tensor: inside a pair of
units the tensors are paired by role, so that a bias cannot end up as another layer's norm weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Key = str | tuple[str, ...]
"""A tensor's name, or the names of several that act as one (separate q, k, v)."""

NORM_ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
ROLES = frozenset({*NORM_ROLES, "in_proj_weight", "in_proj_bias"})
WEIGHTED = ("conv", "linear")
NORMS = ("bn", "norm")


@dataclass(frozen=True)
class Entry:
    """Name, shape and family of type of one tensor. `family`: f floating point, i integer, b boolean."""

    name: str
    shape: Shape
    family: str = "f"

    @property
    def is_counter(self) -> bool:
        """A BatchNorm's `num_batches_tracked`: an integer scalar, which old files lack."""
        return self.shape == () and self.family == "i"


@dataclass
class Unit:
    """One layer. `kind`: conv, linear, bn, norm, vector (a lone weight of one dimension), param (a lone tensor), buffer."""

    path: str
    kind: str
    roles: dict[str, tuple[Key, Shape]]
    index: int = -1
    flat: bool = field(default=False)
    """True where the unit was cut out of a sequence of shapes, because the names say nothing."""

    @property
    def shape(self) -> Shape:
        """Of the main tensor."""
        for role in ("weight", "param"):
            if role in self.roles:
                return self.roles[role][1]
        return next(iter(self.roles.values()))[1]

    @property
    def names(self) -> list[str]:
        """Every tensor of the unit, one by one."""
        return [name for key, _ in self.roles.values() for name in (key if isinstance(key, tuple) else (key,))]

    @property
    def signature(self) -> tuple[str, Shape]:
        return self.kind, self.shape


def entries_of(tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    """Names, shapes and families of a state dict, in its order. Values that are no tensors (extra state) are left out."""
    found = []
    for name, value in tensors.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            found.append(Entry(name, tuple(value.shape), _family(str(value.dtype))))
    return found


def _family(dtype: str) -> str:
    if "bool" in dtype:
        return "b"
    return "i" if "int" in dtype else "f"


def squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def num_elements(shape: Shape) -> int:
    return prod(shape)


def names_speak(entries: Iterable[Entry]) -> bool:
    """Whether the last words of the names tell roles (weight, bias, ...) for most tensors."""
    words = [entry.name.rpartition(".")[2] for entry in entries]
    return sum(word in ROLES for word in words) >= 0.6 * len(words)


def units_of(entries: list[Entry], like: Iterable[Unit] = ()) -> list[Unit]:
    """The layers behind a list of tensors, in the list's order. `like`: layers of a network that these may be, which settle how a
    sequence of shapes is cut where names say nothing and there is more than one way."""
    units = _by_path(entries) if names_speak(entries) else _Cutter(entries, list(like)).cut()
    for index, unit in enumerate(units):
        unit.index = index
    return units


def _kind(roles: Mapping[str, Shape]) -> str:
    if "running_mean" in roles or "running_var" in roles:
        return "bn"
    weight = roles.get("weight")
    if weight is None:
        return "param"
    if len(weight) >= 3:
        return "conv"
    if len(weight) == 2:
        return "linear"
    if len(weight) == 1:
        return "norm" if "bias" in roles else "vector"
    return "param"


def _by_path(entries: list[Entry]) -> list[Unit]:
    siblings: dict[str, list[tuple[str, Entry]]] = {}
    for entry in entries:
        path, _, word = entry.name.rpartition(".")
        siblings.setdefault(path, []).append((word, entry))
    units: list[Unit] = []
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            continue
        path, _, word = entry.name.rpartition(".")
        if word not in ROLES:
            units.append(Unit(entry.name, "buffer" if entry.family != "f" else "param", {"param": (entry.name, entry.shape)}))
            continue
        # nn.MultiheadAttention keeps in_proj_* beside its children: a linear layer of its own.
        projection = word.startswith("in_proj")
        group = [(w, e) for w, e in siblings[path] if w in ROLES and w.startswith("in_proj") == projection]
        seen.update(e.name for _, e in group)
        roles: dict[str, tuple[Key, Shape]] = {w.removeprefix("in_proj_"): (e.name, e.shape) for w, e in group}
        kind = "linear" if projection else _kind({w: e.shape for w, e in group})
        units.append(Unit(path, kind, roles))
    return units


class _Cutter:
    """Cuts a sequence of shapes into layers where names are of no help.

    A weight of two or more dimensions, then r vectors of its output size, then perhaps an integer scalar:
    with the scalar, 4 vectors are a BatchNorm, 5 a bias and a BatchNorm; without it, 2 are a norm and 3 a bias and a norm.
    Lone vectors (a layer scale) and tables (Swin's position biases) look the same; where the network in question has
    such, what its layers of the same shape have decides.
    """

    def __init__(self, entries: list[Entry], like: list[Unit]) -> None:
        self.entries = entries
        self.biased: dict[Shape, set[bool]] = {}
        for unit in like:
            if unit.kind in WEIGHTED:
                self.biased.setdefault(unit.shape, set()).add("bias" in unit.roles)
        self.lone = {squeezed(unit.shape) for unit in like if unit.kind in ("param", "vector")}
        self.units: list[Unit] = []
        # Files written before torch 0.4.1 have no counters; then four equal vectors are taken for a BatchNorm, if the network has any.
        without = bool(like) and not any(unit.kind == "bn" for unit in like)
        self.counters = without or any(entry.is_counter for entry in entries)

    def vectors(self, start: int) -> int:
        """Number of floating vectors of one size that begin at `start`."""
        stop = start
        while stop < len(self.entries):
            entry = self.entries[stop]
            if len(entry.shape) != 1 or entry.family != "f" or entry.shape != self.entries[start].shape:
                break
            stop += 1
        return stop - start

    def counter_at(self, position: int) -> bool:
        return position < len(self.entries) and self.entries[position].is_counter

    def emit(self, kind: str, start: int, *roles: str) -> None:
        found: dict[str, tuple[Key, Shape]] = {role: (self.entries[start + n].name, self.entries[start + n].shape) for n, role in enumerate(roles)}
        self.units.append(Unit(f"#{len(self.units)}", kind, found, flat=True))

    def norms(self, start: int, count: int) -> None:
        """`count` equal vectors with no counter behind them."""
        while count:
            if count >= 4 and not self.counters:
                self.emit("bn", start, *NORM_ROLES[:4])
                start, count = start + 4, count - 4
            elif count >= 2:
                self.emit("norm", start, "weight", "bias")
                start, count = start + 2, count - 2
            else:
                self.emit("param", start, "param")
                start, count = start + 1, count - 1

    def weight(self, at: int) -> int:
        shape = self.entries[at].shape
        follows = at + 1 < len(self.entries) and self.entries[at + 1].shape == (shape[0],)
        run = self.vectors(at + 1) if follows else 0
        if self.counter_at(at + 1 + run):
            biased = run in (3, 5) or (run > 5 and run % 2 == 1)
        else:
            biased = run % 2 == 1
            if shape[:1] in self.lone and self.biased.get(shape) == {not biased} and run and (self.counters or run < 4 or biased):
                biased = not biased
        if not run and shape in self.lone and shape not in self.biased:
            self.emit("param", at, "param")
            return at + 1
        self.emit("conv" if len(shape) >= 3 else "linear", at, *(("weight", "bias") if biased else ("weight",)))
        return at + 1 + biased

    def vector(self, at: int) -> int:
        run = self.vectors(at)
        if not self.counter_at(at + run):
            self.norms(at, run)
            return at + run
        size = 4 if run >= 4 else min(run, 2)
        self.norms(at, run - size)
        self.emit("bn", at + run - size, *(NORM_ROLES if size == 4 else NORM_ROLES[2:] if size == 2 else NORM_ROLES[4:]))
        return at + run + 1

    def cut(self) -> list[Unit]:
        at = 0
        while at < len(self.entries):
            entry = self.entries[at]
            shape = entry.shape
            if entry.family == "f" and len(shape) >= 2 and len(squeezed(shape)) >= 2 and not (len(shape) >= 3 and shape[0] == 1):
                at = self.weight(at)
            elif entry.family == "f" and len(shape) == 1:
                at = self.vector(at)
            else:
                self.emit("param" if entry.family == "f" else "buffer", at, "param")
                at += 1
        return self.units
