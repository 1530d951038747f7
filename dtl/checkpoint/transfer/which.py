"""Which network is a file of weights for? Its shapes, compared with those of all networks of the catalogue: `dtl transfer --source FILE` without a model.

The shapes stand in shapes.npz, made by `python -m dtl.checkpoint.transfer.which` (minutes: every network is built, without memory) with the versions of
torchvision and timm that it names. Networks that only another version has are built when a file is looked up on the command line, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dtl.checkpoint.transfer.layers.layer import Shape, TensorSpec, detect_heads, layers_of, specs_of, squeezed
from dtl.models.catalog import find, model_names
from dtl.models.meta import build_on_meta
from dtl.text import Log, counted, to_nobody

TABLE = Path(__file__).with_name("shapes.npz")
_LIBRARIES = ("torchvision", "timm")
_ALIKE = 0.9
"""A file is said to look like a network of which it has this share of tensors, and that has this share of its own."""


@dataclass(frozen=True)
class Candidate:
    """A network, and how many of the file's tensors fit one of its own by shape, heads aside, q, k and v counted one by one. `named`: under the same names."""

    model: str
    fits: int
    source: int
    network: int
    named: bool = False

    @property
    def share(self) -> float:
        """Of all tensors of both."""
        return self.fits / max(1, self.source + self.network - self.fits)

    def __str__(self) -> str:
        more = f", of {self.network} of the network" if self.network != self.source else ""
        return f"{self.model} ({self.fits} of {self.source} tensors fit{more}{'' if self.named or self.share < 1 else ', under other names'})"


def which(specs: Sequence[TensorSpec], *, most: int = 3, log: Log | None = None) -> list[Candidate]:
    """The networks of the catalogue that are most like the weights, the best first. `log`: networks that the table lacks may be built, and a line says so."""
    have = _shapes(specs)
    if not have:
        return []
    tables = [_table(), *((_newer(log),) if log is not None else ())]
    found = [candidate for table in tables if table is not None for candidate in table.compare(have, _digest(specs))]
    order = {"torchvision": 0, "timm": 1}
    found.sort(key=lambda each: (-each.share, not each.named, order.get(each.model.partition("/")[0], 2), len(each.model), each.model))
    return found[:most]


def looks_like(specs: Sequence[TensorSpec], model: str) -> Candidate | None:
    """The network that the weights are clearly for, where that is another than `model`."""
    found = which(specs, most=10**6)
    if not found or found[0].share < _ALIKE:
        return None
    near = [each for each in found if each.share > found[0].share - (1 - _ALIKE)]
    return None if any(each.model == model.partition(".")[0] for each in near) else found[0]


def summary(specs: Sequence[TensorSpec], found: Sequence[Candidate]) -> str:
    """One line: what the weights are, and what they look like."""
    layers = layers_of(list(specs))
    kinds = Counter(layer.kind for layer in layers)
    what = " and ".join(counted(kinds[kind], word) for kind, word in (("conv", "convolution"), ("linear", "linear layer")) if kinds[kind]) or "tensors"
    if not found or found[0].share < 0.2:
        return f"{what} look like no network of torchvision or timm"
    return f"{what} look like {found[0]}" + (f", or {' or '.join(map(str, found[1:]))}" if found[1:] else "")


# --- the table ---


@dataclass(frozen=True)
class Shapes:
    """Of each network its shapes (`kinds`: places in `shapes`) and how many tensors have each (`counts`); `sizes`: how many kinds belong to each network."""

    models: list[str]
    digests: Any
    sizes: Any
    kinds: Any
    counts: Any
    shapes: list[str]
    versions: str

    def compare(self, have: Counter[str], digest: int) -> list[Candidate]:
        place = {shape: number for number, shape in enumerate(self.shapes)}
        ours = np.zeros(len(self.shapes), np.int64)
        for shape, count in have.items():
            if shape in place:
                ours[place[shape]] = count
        counts = self.counts.astype(np.int64)
        if "" not in have and "" in place:  # counters, which old files do not have
            counts = np.where(self.kinds == place[""], 0, counts)
        starts = np.concatenate([[0], np.cumsum(self.sizes.astype(np.int64))[:-1]])
        fits = np.add.reduceat(np.minimum(counts, ours[self.kinds]), starts)
        totals = np.add.reduceat(counts, starts)
        named, own = self.digests == np.uint64(digest), sum(have.values())
        return [Candidate(name, int(fits[i]), own, int(totals[i]), bool(named[i])) for i, name in enumerate(self.models) if fits[i]]

    def save(self, path: Path) -> None:
        models, shapes, versions = (np.frombuffer("\n".join(lines).encode(), np.uint8) for lines in (self.models, self.shapes, [self.versions]))
        with path.open("wb") as file:
            np.savez_compressed(
                file, models=models, shapes=shapes, versions=versions, digests=self.digests, sizes=self.sizes, kinds=self.kinds, counts=self.counts
            )

    @classmethod
    def load(cls, path: Path) -> Shapes:
        with np.load(path) as file:
            models, shapes, versions = (bytes(file[name]).decode() for name in ("models", "shapes", "versions"))
            return cls(models.split("\n"), file["digests"], file["sizes"], file["kinds"], file["counts"], shapes.split("\n"), versions)

    @classmethod
    def of(cls, models: Iterable[str], log: Callable[[str], None]) -> Shapes:
        """Each network built on the meta device; those that cannot be built are left out, and named."""
        names, digests, sizes, kinds, counts = [], [], [], [], []
        place: dict[str, int] = {}
        for model in models:
            try:
                specs = specs_of(build_on_meta(lambda model=model: find(model).construct(num_classes=1000)).state_dict())  # type: ignore[misc]
            except Exception as error:  # timm lists some that need packages of their own
                log(f"{model} is left out: {' '.join(str(error).split())[:200]}")
                continue
            shapes = _shapes(specs)
            names.append(model)
            digests.append(_digest(specs))
            sizes.append(len(shapes))
            kinds += [place.setdefault(shape, len(place)) for shape in sorted(shapes)]
            counts += [shapes[shape] for shape in sorted(shapes)]
        small = [np.array(values, np.uint16) for values in (sizes, kinds, counts)]
        return cls(names, np.array(digests, np.uint64), small[0], small[1], small[2], list(place), versions())


@cache
def _table() -> Shapes:
    return Shapes.load(TABLE)


def versions() -> str:
    """Of the installed catalogues."""
    return ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "none"


def _newer(log: Log) -> Shapes | None:
    """The networks of the installed versions that the table lacks."""
    known = _table()
    if known.versions == versions():
        return None
    from dtl.data.remote.address import cache_place

    path = cache_place(None) / f"shapes-{versions().replace(', ', '-').replace(' ', '-')}.npz"
    if path.is_file():
        return Shapes.load(path)
    missing = sorted(set(model_names()) - set(known.models))
    if not missing:
        return None
    built = "is" if len(missing) == 1 else "are"
    log(f"the table of shapes is of {known.versions}; {counted(len(missing), 'network')} of {versions()} {built} built once to be compared, too")
    made = Shapes.of(missing, to_nobody)
    made.save(path)
    return made


_FUSED = re.compile(r"(^|[._])(qkv|in_proj)([._]|$)")


def _shapes(specs: Sequence[TensorSpec]) -> Counter[str]:
    """Shape -> number of tensors that are learned, or count steps; without sides of 1, and q, k, v apart: libraries differ in both."""
    head = {name for layer in detect_heads(layers_of(list(specs))) for name in layer.names}
    found: Counter[str] = Counter()
    for spec in specs:
        if spec.name in head or (spec.family != "f" and not spec.is_counter):
            continue
        shape: Shape = squeezed(spec.shape)
        third = bool(shape) and shape[0] % 3 == 0 and _FUSED.search(spec.name) is not None
        found["x".join(map(str, (shape[0] // 3, *shape[1:]) if third else shape))] += 3 if third else 1
    return found


def _digest(specs: Sequence[TensorSpec]) -> int:
    """Of the names, the head's aside."""
    head = {name for layer in detect_heads(layers_of(list(specs))) for name in layer.names}
    names = sorted(spec.name for spec in specs if spec.family == "f" and spec.name not in head)
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "little")


if __name__ == "__main__":
    from dtl.text import to_stderr

    Shapes.of(model_names(), to_stderr).save(TABLE)
