"""A list of tensors seen as a list of layers: one `Layer` for a convolution, a linear layer, a norm with all of its tensors.

Everything here works on names and shapes alone. Weights are aligned layer by layer, never tensor by tensor: inside a pair of
layers the tensors are paired by role, so that a bias cannot end up as another layer's norm weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import isqrt, prod
from typing import TYPE_CHECKING

from dtl.errors import UserError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Key = tuple[str, ...]
"""The names of the tensors that act as one: nearly always one name; three for separate q, k, v."""

NORM_ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
ROLES = frozenset({*NORM_ROLES, "in_proj_weight", "in_proj_bias"})
WEIGHTED = ("conv", "linear")
NORMS = ("bn", "norm")


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and family of type of one tensor. `family`: f floating point, i integer, b boolean."""

    name: str
    shape: Shape
    family: str = "f"

    @property
    def is_counter(self) -> bool:
        """A BatchNorm's `num_batches_tracked`: an integer scalar, which old files lack."""
        return self.shape == () and self.family == "i"


@dataclass
class Layer:
    """One layer. `kind`: conv, linear, bn, norm, vector (a lone weight of one dimension), param (a lone tensor), buffer."""

    path: str
    kind: str
    roles: dict[str, tuple[Key, Shape]]
    index: int = -1
    flat: bool = field(default=False)
    """True where the layer was cut out of a sequence of shapes, because the names carry no roles."""
    grid: tuple[int, int] | None = None
    """Of a table of positions, where the module that holds it says how its rows lie."""

    @property
    def shape(self) -> Shape:
        """Of the main tensor."""
        for role in ("weight", "param"):
            if role in self.roles:
                return self.roles[role][1]
        return next(iter(self.roles.values()))[1]

    @property
    def names(self) -> list[str]:
        """Every tensor of the layer, one by one."""
        return [name for key, _ in self.roles.values() for name in key]

    @property
    def signature(self) -> tuple[str, Shape]:
        return self.kind, self.shape


def specs_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """Names, shapes and families of a state dict, in its order. Values that are no tensors (extra state) are left out."""
    found = []
    for name, value in tensors.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            found.append(TensorSpec(name, tuple(value.shape), _family(str(value.dtype))))
    return found


def _family(dtype: str) -> str:
    if "bool" in dtype:
        return "b"
    return "i" if "int" in dtype else "f"


def squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def num_elements(shape: Shape) -> int:
    return prod(shape)


def names_speak(specs: Sequence[TensorSpec], like: Iterable[Layer] = ()) -> bool:
    """Whether the last words of the names tell roles (weight, bias, ...) for most tensors, or most names are those of a network, `like`."""
    known = {name for layer in like for name in layer.names}
    words = [spec.name.rpartition(".")[2] for spec in specs]
    return max(sum(word in ROLES for word in words), sum(spec.name in known for spec in specs)) >= 0.6 * len(words)


def layers_of(specs: list[TensorSpec], like: Iterable[Layer] = (), *, named: bool = False) -> list[Layer]:
    """The layers behind a list of tensors, in the list's order. `like`: layers of a network that these may be, which settle how a
    sequence of shapes is cut where names carry no roles and there is more than one way. `named`: the names are those of modules, whatever they say."""
    those = list(like)
    layers = _by_path(specs) if named or names_speak(specs, those) else _Cutter(specs, those).cut()
    for index, layer in enumerate(layers):
        layer.index = index
    return layers


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


def _by_path(specs: list[TensorSpec]) -> list[Layer]:
    siblings: dict[str, list[tuple[str, TensorSpec]]] = {}
    for spec in specs:
        path, _, word = spec.name.rpartition(".")
        siblings.setdefault(path, []).append((word, spec))
    layers: list[Layer] = []
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            continue
        path, _, word = spec.name.rpartition(".")
        if word not in ROLES:
            layers.append(Layer(spec.name, "buffer" if spec.family != "f" else "param", {"param": ((spec.name,), spec.shape)}))
            continue
        # nn.MultiheadAttention keeps in_proj_* beside its children: a linear layer of its own.
        projection = word.startswith("in_proj")
        group = [(w, e) for w, e in siblings[path] if w in ROLES and w.startswith("in_proj") == projection]
        seen.update(e.name for _, e in group)
        roles: dict[str, tuple[Key, Shape]] = {w.removeprefix("in_proj_"): ((e.name,), e.shape) for w, e in group}
        kind = "linear" if projection else _kind({w: e.shape for w, e in group})
        layers.append(Layer(path, kind, roles))
    return layers


class _Cutter:
    """Cuts a sequence of shapes into layers where names are of no help.

    A weight of two or more dimensions, then r vectors of its output size, then perhaps an integer scalar:
    with the scalar, 4 vectors are a BatchNorm, 5 a bias and a BatchNorm; without it, 2 are a norm and 3 a bias and a norm.
    Lone vectors (a layer scale) and tables (Swin's position biases) look the same; where the network in question has
    such, what its layers of the same shape have decides.
    """

    def __init__(self, specs: list[TensorSpec], like: list[Layer]) -> None:
        self.specs = specs
        self.biased: dict[Shape, set[bool]] = {}
        for layer in like:
            if layer.kind in WEIGHTED:
                self.biased.setdefault(layer.shape, set()).add("bias" in layer.roles)
        self.lone = {squeezed(layer.shape) for layer in like if layer.kind in ("param", "vector")}
        self.layers: list[Layer] = []
        # Files written before torch 0.4.1 have no counters; then four equal vectors are taken for a BatchNorm, if the network has any.
        without = bool(like) and not any(layer.kind == "bn" for layer in like)
        self.counters = without or any(spec.is_counter for spec in specs)

    def vectors(self, start: int) -> int:
        """Number of floating vectors of one size that begin at `start`."""
        stop = start
        while stop < len(self.specs):
            spec = self.specs[stop]
            if len(spec.shape) != 1 or spec.family != "f" or spec.shape != self.specs[start].shape:
                break
            stop += 1
        return stop - start

    def counter_at(self, position: int) -> bool:
        return position < len(self.specs) and self.specs[position].is_counter

    def emit(self, kind: str, start: int, *roles: str) -> None:
        found: dict[str, tuple[Key, Shape]] = {role: ((self.specs[start + n].name,), self.specs[start + n].shape) for n, role in enumerate(roles)}
        self.layers.append(Layer(f"#{len(self.layers)}", kind, found, flat=True))

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
        shape = self.specs[at].shape
        follows = at + 1 < len(self.specs) and self.specs[at + 1].shape == (shape[0],)
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

    def cut(self) -> list[Layer]:
        at = 0
        while at < len(self.specs):
            spec = self.specs[at]
            shape = spec.shape
            if spec.family == "f" and len(shape) >= 2 and len(squeezed(shape)) >= 2 and not (len(shape) >= 3 and shape[0] == 1):
                at = self.weight(at)
            elif spec.family == "f" and len(shape) == 1:
                at = self.vector(at)
            else:
                self.emit("param" if spec.family == "f" else "buffer", at, "param")
                at += 1
        return self.layers


def loose_signature(layer: Layer) -> tuple[str, tuple[int, ...]]:
    """What two layers must share to be the same up to size-1 dimensions: a linear layer and a 1x1 convolution do."""
    if layer.kind in WEIGHTED:
        return "weighted", squeezed(layer.shape) or layer.shape
    if layer.kind in ("param", "vector"):
        return "param", squeezed(layer.shape)
    return layer.kind, layer.shape


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, at any depth."""


def strip_wrappers(name: str) -> str:
    *path, word = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), word])


def looks_sorted(specs: Sequence[TensorSpec]) -> bool:
    """Whether the names stand in alphabetical order, as safetensors writes them: no module registers bias before weight."""
    names = [spec.name for spec in specs if spec.family == "f"]
    return len(names) > 8 and names == sorted(names)


_HEAD_WORDS = ("head", "heads", "head_dist", "fc", "classifier", "classif", "linear", "last_linear", "logits", "output", "out", "cls")


def head_layers(layers: Sequence[Layer], heads: Sequence[str] | None) -> list[Layer]:
    """The head's layers: those inside the modules named in `heads`, else found. UserError on a name that holds no layer."""
    if heads is None:
        return detect_heads(layers)
    if isinstance(heads, str):
        raise UserError(f"heads: must be a list: ['{heads}']")
    found = []
    for head in heads:
        inside = [layer for layer in layers if layer.path == head or layer.path.startswith(head + ".")]
        if not inside:
            raise UserError(f"heads: the network has no layer called {head}")
        found += inside
    return found


def detect_heads(layers: Sequence[Layer]) -> list[Layer]:
    """The last linear layer (or last convolution that is called a classifier), and auxiliary heads of as many outputs.

    The last of those whose top module is called so (`fc`, `head.fc`), wherever it is registered; else the last of all.
    """
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    if len(weighted) < 2:
        return []
    called = [layer for layer in weighted if layer.kind == "linear" and _called_head(layer.path.split(".")[0]) and not _auxiliary(layer.path)]
    last = called[-1] if called and weighted[-1].kind == "linear" and not _called_head(weighted[-1].path) else weighted[-1]
    if _sorted(layers):
        named = _top_heads(weighted)
        if not named:
            return []
        last = named[-1]
    if last.kind == "conv" and not _called_head(last.path):
        return []
    if last.kind == "linear" and len(last.shape) != 2:
        return []
    outputs = last.shape[0]
    return [layer for layer in weighted if layer is last or (layer.shape[0] == outputs and _auxiliary(layer.path) and _called_head(layer.path))]


def _sorted(layers: Sequence[Layer]) -> bool:
    """As safetensors sorts names: paths, and within each layer, where no module registers its bias before its weight."""
    paths = [layer.path for layer in layers]
    return len(paths) > 4 and paths == sorted(paths) and all(layer.names == sorted(layer.names) for layer in layers)


def _top_heads(weighted: Sequence[Layer]) -> list[Layer]:
    """The layers whose top module, below the modules around all of them, is called a head. Sorted names (safetensors) say nothing else of what comes
    last: a ViT's patch embedding does."""
    shared = list(takewhile(lambda words: len(set(words)) == 1, zip(*(layer.path.split(".")[:-1] for layer in weighted))))
    named = [layer for layer in weighted if _called_head(layer.path.split(".")[len(shared)]) and not re.search(r"aux|\bpre_", layer.path.lower())]
    return [layer for layer in named if layer.kind == "linear"] or named


def _called_head(path: str) -> bool:
    return any(word.rstrip("0123456789") in _HEAD_WORDS for word in path.lower().split("."))


def _auxiliary(path: str) -> bool:
    return "aux" in path.lower() or path.lower().startswith("head")


def num_source_classes(layers: Sequence[Layer], otherwise: int) -> int:
    """Outputs of the head that is found among these layers; `otherwise` where there is none."""
    heads = detect_heads(layers)
    return heads[0].shape[0] if heads else otherwise


_PART = {"q": 0, "query": 0, "k": 1, "key": 1, "v": 2, "value": 2}


def fuse_projections(layers: Sequence[Layer], other: Sequence[Layer]) -> list[Layer]:
    """`layers` with each q, k, v (or q beside a fused kv) of one module as a single layer, if `other` holds layers of the fused shape. Biases that only some of
    them have (BEiT's q and v) stand as layers of their own.

    Only where names tell which is q, k and v: the three have one shape, and their order of registration means nothing.
    """
    fused_there = [layer for layer in other if layer.kind == "linear" and layer.shape[0] == 3 * layer.shape[1]]
    wanted, called = {layer.shape for layer in fused_there}, {layer.path for layer in fused_there}
    present = {layer.shape for layer in layers if layer.kind == "linear"}
    projections = _projections(layers)
    fused: list[Layer] = []
    inside: set[int] = set()
    for at, layer in enumerate(layers):
        parts = projections.get(at)
        joined = None if parts is None else _joined(parts)
        if parts is not None and joined is not None and joined.shape in wanted and (joined.shape not in present or called & {joined.path, _above(joined.path)}):
            if "bias" not in joined.roles:  # in front, where a module registers such biases of its own
                fused += [Layer(each.path, "param", {"bias": each.roles["bias"]}) for each in parts if "bias" in each.roles]
            fused.append(joined)
            inside.update(id(each) for each in parts)
        elif id(layer) not in inside:
            fused.append(layer)
    if not inside:
        return list(layers)
    return [Layer(u.path, u.kind, u.roles, index, u.flat) for index, u in enumerate(fused)]


def _above(path: str) -> str:
    """The module around: nn.MultiheadAttention keeps its fused projection itself, beside its children."""
    return path.rpartition(".")[0]


def part_of(path: str) -> int | None:
    """0, 1, 2 for a path whose last word is query, key or value."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", path.rpartition(".")[2])]
    found = {_PART[word] for word in words if word in _PART}
    return found.pop() if len(found) == 1 else None


def split_transforms(parts: int) -> tuple[str, ...]:
    """What takes q, k and v, or q and kv, out of a fused projection."""
    return ("split_0_of_3", "split_1_to_2_of_3") if parts == 2 else tuple(f"split_{part}_of_{parts}" for part in range(parts))


def _place_in_projection(layer: Layer) -> int | None:
    """0, 1, 2 for a layer called q, k and v, 1 for a fused kv."""
    if layer.kind != "linear":
        return None
    if layer.shape[0] == layer.shape[1]:
        return part_of(layer.path)
    return 1 if layer.shape[0] == 2 * layer.shape[1] and "kv" in re.findall(r"[a-z]+", layer.path.rpartition(".")[2].lower()) else None


def _projections(layers: Sequence[Layer]) -> dict[int, list[Layer]]:
    """Place of the first of a module's q, k and v, or q and kv -> these, wherever they stand (sorted names have others between them)."""
    modules: dict[str, list[tuple[int, int]]] = {}
    for at, layer in enumerate(layers):
        place = _place_in_projection(layer)
        if place is not None:
            modules.setdefault(layer.path.rpartition(".")[0], []).append((place, at))
    found = {}
    for places in modules.values():
        parts = [layers[at] for _, at in sorted(places)]
        whole = sum(layer.shape[0] for layer in parts) == 3 * parts[0].shape[1] and [place for place, _ in sorted(places)] == list(range(len(parts)))
        if whole and len(parts) > 1 and len({layer.shape[1:] for layer in parts}) == 1 and all("weight" in layer.roles for layer in parts):
            found[min(at for _, at in places)] = parts
    return found


def _joined(parts: list[Layer]) -> Layer:
    roles: dict[str, tuple[Key, Shape]] = {}
    for role in ("weight", "bias"):
        if all(role in layer.roles for layer in parts):
            keys = tuple(name for layer in parts for name in layer.roles[role][0])
            shape = parts[0].roles[role][1]
            roles[role] = (keys, (sum(layer.roles[role][1][0] for layer in parts), *shape[1:]))
    return Layer(parts[0].path.rpartition(".")[0] + ".qkv", "linear", roles)


# ---- shapes that can be made to fit


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
        how = tensor_transform(have, shape, kinds=(source.kind, target.kind), name=target.path, first=first and role == "weight", grid=target.grid)
        if how is None:
            return None
        transform = how
    return transform


def tensor_transform(have: Shape, want: Shape, *, kinds: tuple[str, str], name: str, first: bool, grid: tuple[int, int] | None = None) -> str | None:
    """The transform from shape `have` to shape `want`, by what kind of layer and what name it is; None where there is none. `grid`: see Layer."""
    weighted = kinds[0] in WEIGHTED and kinds[1] in WEIGHTED
    if weighted and not (squeezed(have) == squeezed(want) and "position" in name):  # an nn.Embedding of positions looks like a linear layer
        return _weight_transform(have, want, first=first, patches="patch" in name or "proj" in name.split(".")[-1])
    if squeezed(have) == squeezed(want):
        return "squeeze"
    lowered = name.lower()
    if "attention_biases" in lowered:
        return distances_transform(have, want, grid)
    if lowered.endswith(AXIS_TABLES):
        return "resize_relative_axis" if is_axis_table(have, want) else None
    if "relative_position_bias_table" in lowered:
        return relative_transform(have, want, grid)
    if lowered.endswith("pos_emb") and len(have) == 3 and have[0] > 1:  # LambdaNetworks
        return "resize_relative_table" if is_relative_table(have, want) else None
    return position_transform(have, want, grid) if "pos" in lowered and "relative" not in lowered else None


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


Grid = tuple[int, int]
MOST_IN_FRONT = 8
"""Rows of a position table that belong to no place: class token, distillation token, registers."""


def position_transform(have: Shape, want: Shape, grid: Grid | None) -> str | None:
    """The transform that resizes a table of positions; None where these are none. `grid`: the target's; by default it is a square."""
    if grid is None or len(want) != 3:
        return "resize_position_embedding" if is_position_table(have, want) else None
    if not (len(have) == 3 and have[0] == want[0] == 1 and have[2] == want[2]) or rows_in_front(have[1], want[1] - grid[0] * grid[1]) is None:
        return None
    usual = grid[0] == grid[1] and (_grid(have[1]), _grid(want[1])) != (None, None) and want[1] - grid[0] ** 2 <= 2
    return "resize_position_embedding" if usual and is_position_table(have, want) else f"resize_position_embedding_{grid[0]}x{grid[1]}"


def rows_in_front(rows: int, wanted: int) -> int | None:
    """Of a table of `rows` whose other rows are a square: `wanted` where that fits, else the fewest, which must be more; None where none does."""
    fitting = [front for front in range(min(MOST_IN_FRONT, rows - 1) + 1) if isqrt(rows - front) ** 2 == rows - front]
    return wanted if wanted in fitting else next((front for front in fitting[:1] if front > wanted), None)


def relative_transform(have: Shape, want: Shape, grid: Grid | None) -> str | None:
    """The same for a table of relative positions. `grid`: of the distances, (2h-1, 2w-1); BEiT has three more rows, for the class token."""
    if is_relative_table(have, want):
        return "resize_relative_table"
    if grid is None or not (len(have) == len(want) == 2 and have[1] == want[1]):
        return None
    extra = want[0] - grid[0] * grid[1]
    side = isqrt(max(have[0] - extra, 0))
    return f"resize_relative_table_{grid[0]}x{grid[1]}" if 0 <= extra <= 3 and side % 2 == 1 and side**2 == have[0] - extra else None


def distances_transform(have: Shape, want: Shape, grid: Grid | None) -> str | None:
    """The same for biases by distance without its sign, [heads, h * w] (LeViT, EfficientFormer, TinyViT). `grid`: (h, w); by default it is a square."""
    if not (len(have) == len(want) == 2 and have[0] == want[0]) or isqrt(have[1]) ** 2 != have[1]:
        return None
    height, width = grid or (isqrt(want[1]), isqrt(want[1]))
    return f"resize_attention_biases_{height}x{width}" if height * width == want[1] else None


AXIS_TABLES = ("height_rel", "width_rel", "rel_pos_h", "rel_pos_w")


def is_axis_table(have: Shape, want: Shape) -> bool:
    """Embeddings of the distances along one axis, [2s-1, D] (BoTNet, SAM, MViT)."""
    return len(have) == len(want) == 2 and have[1] == want[1] and have[0] % 2 == want[0] % 2 == 1


def is_position_table(have: Shape, want: Shape) -> bool:
    """[1, N, D], [1, D, H, W] or [1, H, W, D] both, of one width."""
    if len(have) == len(want) == 3:
        return have[0] == want[0] == 1 and have[2] == want[2] and _grid(have[1]) is not None and _grid(want[1]) is not None
    if not (len(have) == len(want) == 4 and have[0] == want[0] == 1):
        return False
    return have[1] == want[1] or (have[3] == want[3] and have[1] == have[2])  # with the channels last only of a square grid: 64 x 14 x 14 are channels first


def _grid(num_tokens: int) -> int | None:
    """The side of the square grid behind a row of tokens, with up to two tokens more (class, distillation)."""
    return next((isqrt(num_tokens - extra) for extra in (0, 1, 2) if isqrt(num_tokens - extra) ** 2 == num_tokens - extra), None)


def has_heads_first(have: Shape, want: Shape) -> bool:
    """Of two tables [heads, 2h-1, 2w-1] (MaxViT), not [2h-1, 2w-1, heads] (LambdaNetworks)."""
    return have[0] == want[0] and all(side % 2 == 1 for side in (*have[1:], *want[1:]))


def is_relative_table(have: Shape, want: Shape) -> bool:
    """[(2s-1)^2, heads], [heads, 2h-1, 2w-1] or [2h-1, 2w-1, heads]; the same number of heads."""
    if len(have) == len(want) == 3:
        return has_heads_first(have, want) or (have[2] == want[2] and all(side % 2 == 1 for side in (*have[:2], *want[:2])))
    if not (len(have) == len(want) == 2 and have[1] == want[1]):
        return False
    return all(isqrt(rows) ** 2 == rows and isqrt(rows) % 2 == 1 for rows in (have[0], want[0]))
