"""The order in which a network uses its tensors, and which layers feed which: one forward pass on the meta device.

Registration order is a habit of whoever wrote the module; execution order is what the function is. No memory is allocated and
no arithmetic done: the module is copied with every tensor replaced by a meta tensor, and a `TorchFunctionMode` watches.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dtl.checkpoint.transfer.layers.layer import MOST_IN_FRONT, NORMS, WEIGHTED, Layer, TensorSpec, layers_of, loose_signature, specs_of
from dtl.config.models import ImageSize, as_size, sides

# Reads of attributes and sizes: not uses.
_NO_USE = frozenset(
    """__get__ __set__ size dim numel is_floating_point __len__ get_device type stride is_contiguous __hash__ register_hook
    requires_grad_ data_ptr is_complex element_size storage_offset""".split()  # noqa: SIM905
)
# Their result has the shape of their first argument and nothing else of it: an empty tensor saves the slow decompositions.
_SHAPE_KEPT = frozenset(
    """batch_norm layer_norm group_norm instance_norm relu relu_ relu6 silu gelu sigmoid hardswish hardsigmoid hardtanh leaky_relu
    elu mish softmax dropout dropout2d feature_dropout stochastic_depth""".split()  # noqa: SIM905
)
_SIZES = (224, 256, 299, 384, 240, 288, 192, 160, 128, 64, 32, 28)


@dataclass(frozen=True)
class Dataflow:
    """`order`: names of tensors by first use. `feeds`: tensor -> the tensors of the layers whose output it is applied to."""

    order: tuple[str, ...]
    feeds: dict[str, frozenset[str]]


@dataclass
class _Watch(TorchFunctionMode):
    """Notes the first use of each named tensor, and hands each result the names of the layers it came from."""

    names: dict[int, str]
    order: list[str] = field(default_factory=list)
    feeds: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.origins: dict[int, frozenset[str]] = {}
        # Ids are only unique among living objects, so every result is kept alive.
        self.alive: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SHAPE_KEPT and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            out = torch.empty_like(args[0])
        else:
            out = func(*args, **kwargs)
        if name in _NO_USE:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        used = [self.names[id(tensor)] for tensor in inputs if id(tensor) in self.names]
        upstream: frozenset[str] = frozenset().union(*(self.origins.get(id(tensor), frozenset()) for tensor in inputs))
        for name in used:
            if name not in self.feeds:
                self.order.append(name)
                self.feeds[name] = upstream
        origin = frozenset(used[:1]) if used else upstream
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.origins[id(leaf)] = origin
                self.alive.append(leaf)
        return out


def on_meta(module: nn.Module) -> nn.Module:
    """A shallow copy of the module in eval mode, without memory: every tensor becomes a meta tensor of the same shape.

    Submodules are copied, everything else they hold is shared: `copy.deepcopy` takes several times as long.
    """
    copies: dict[int, Any] = {}

    def tensor(value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None or value.is_meta:
            return value
        if id(value) not in copies:
            empty = torch.empty_like(value, device="meta")
            copies[id(value)] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
        found: torch.Tensor = copies[id(value)]
        return found

    def shadow(original: nn.Module) -> nn.Module:
        if id(original) in copies:
            known: nn.Module = copies[id(original)]
            return known
        twin: nn.Module = copy.copy(original)
        copies[id(original)] = twin
        twin.__dict__ = original.__dict__.copy()
        twin.__dict__["training"] = False
        twin.__dict__["_parameters"] = {name: tensor(value) for name, value in original._parameters.items()}
        twin.__dict__["_buffers"] = {name: tensor(value) for name, value in original._buffers.items()}
        twin.__dict__["_modules"] = {name: child and shadow(child) for name, child in original._modules.items()}
        return twin

    return shadow(module)


def trace_dataflow(module: nn.Module, *, image_size: ImageSize | None = None) -> Dataflow | None:
    """Run the module once on the meta device in eval mode; None where it cannot run there (control flow by values)."""
    shadow = on_meta(module)
    names: dict[int, str] = {}
    for name, tensor in (*shadow.named_parameters(remove_duplicate=False), *shadow.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), name)
    for shape in _input_shapes(shadow, image_size):
        # Networks that make tensors on their way need the default device to be meta, which slows every call down.
        for default in (contextlib.nullcontext(), torch.device("meta")):
            watch = _Watch(names)
            try:
                with torch.no_grad(), default, watch:
                    shadow(torch.empty(shape, device="meta"))
            except Exception:  # another size may fit; what fails with all of them cannot run here
                continue
            return Dataflow(tuple(watch.order), watch.feeds)
    return None


def _input_shapes(module: nn.Module, image_size: ImageSize | None) -> list[tuple[int, ...]]:
    """Inputs to try: images of the channels that a convolution takes, at the size the module hints at, else at common ones."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        widths = dict.fromkeys(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
        return [(2, width) for width in list(widths)[:8]]
    taken = dict.fromkeys(m.in_channels for m in convolutions)
    # The first one registered is nearly always the one that sees the image; else one that takes as many channels as images have.
    channels = [next(iter(taken)), *(count for count in (3, 1, 4, 2) if count in taken)]
    sizes = dict.fromkeys([size for size in (image_size, *_size_hints(module)) if size] + list(_SIZES))
    return [(2, count, *sides(size)) for count in dict.fromkeys(channels) for size in sizes]


def _size_hints(module: nn.Module) -> list[ImageSize | None]:
    """Where torchvision and timm keep the input size of networks that take no other."""
    config = getattr(module, "default_cfg", None)
    size = config.get("input_size", (None,)) if isinstance(config, dict) else None
    places = (getattr(getattr(module, "patch_embed", None), "img_size", None), getattr(module, "image_size", None))
    return [_size_of(value) for value in (*places, getattr(module, "img_size", None), size)]


def _size_of(value: Any) -> ImageSize | None:
    sides_of = [value, value] if isinstance(value, int) else list(value)[-2:] if isinstance(value, (tuple, list)) else []
    return as_size(*sides_of) if len(sides_of) == 2 and all(isinstance(side, int) and side > 0 for side in sides_of) else None


@dataclass
class Target:
    """`ties`: second names of a tensor that two modules share -> its first name."""

    specs: list[TensorSpec]
    layers: list[Layer]
    ties: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = None
    image_size: ImageSize | None = None
    trace: bool = True

    @cached_property
    def dataflow(self) -> Dataflow | None:
        """Execution order and producers, from a run on the meta device; None for a bare dict or a network that cannot run there."""
        if self.module is None or not self.trace:
            return None
        return trace_dataflow(self.module, image_size=self.image_size)


def target_of(model: nn.Module | Mapping[str, torch.Tensor], *, image_size: ImageSize | None = None, trace: bool = True) -> Target:
    if not isinstance(model, nn.Module):
        specs = specs_of(model)
        return Target(specs, layers_of(specs))
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and first.setdefault(id(value), name) != name:
            ties[name] = first[id(value)]
    specs = specs_of(state)
    layers, grids = layers_of(specs, named=True), _grids(model)
    for layer in layers:
        layer.grid = grids.get(layer.names[0])
    return Target(specs, layers, ties, model, image_size, trace)


def _grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How the rows of each table of positions lie, where the module that holds it says so, as timm's and torchvision's do."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        window = _pair(getattr(module, "window_size", None))
        if window is not None and isinstance(getattr(module, "relative_position_bias_table", None), torch.Tensor):
            found[f"{prefix}relative_position_bias_table"] = (2 * window[0] - 1, 2 * window[1] - 1)
        distances = _pair(getattr(module, "resolution", None))
        if distances is not None and isinstance(getattr(module, "attention_biases", None), torch.Tensor):
            found[f"{prefix}attention_biases"] = distances
        grid = _pair(getattr(getattr(module, "patch_embed", None), "grid_size", None))
        if grid is None:
            continue
        for name, table in module.named_parameters(prefix=path, recurse=False):
            if "pos" in name and table.dim() == 3 and 0 <= table.shape[1] - grid[0] * grid[1] <= MOST_IN_FRONT:
                found[name] = grid
    return found


def _pair(value: Any) -> tuple[int, int] | None:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value) else None


Link = tuple[str, int]
"""("post", layer): the norm comes after that layer; ("pre", layer): before it."""


def owners(layers: Sequence[Layer]) -> dict[str, int]:
    """Tensor name -> index of its layer."""
    return {name: layer.index for layer in layers for name in layer.names}


def producers(layers: Sequence[Layer], flow: Dataflow) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """(layers that feed a layer, layers that it feeds), by index."""
    own = owners(layers)
    before: dict[int, set[int]] = defaultdict(set)
    after: dict[int, set[int]] = defaultdict(set)
    for name, upstream in flow.feeds.items():
        if name not in own:
            continue
        for other in upstream:
            if other in own and own[other] != own[name]:
                before[own[name]].add(own[other])
                after[own[other]].add(own[name])
    return before, after


def links_by_dataflow(layers: Sequence[Layer], flow: Dataflow) -> dict[int, set[Link]]:
    """Norm -> layers that feed it (of as many channels) and layers that it feeds."""
    before, after = producers(layers, flow)
    by_index = {layer.index: layer for layer in layers}
    links = {}
    for layer in layers:
        if layer.kind not in NORMS:
            continue
        found: set[Link] = {("post", other) for other in before[layer.index] if by_index[other].kind in WEIGHTED and by_index[other].shape[0] == layer.shape[0]}
        found |= {("pre", other) for other in after[layer.index] if by_index[other].kind in WEIGHTED}
        if found:
            links[layer.index] = found
    return links


def links_by_neighbours(layers: Sequence[Layer]) -> dict[int, set[Link]]:
    """The same from registration order alone, only where layers and norms strictly alternate."""
    links: dict[int, set[Link]] = {}
    for at, layer in enumerate(layers):
        if layer.kind not in NORMS:
            continue
        before = layers[at - 1] if at else None
        after = layers[at + 1] if at + 1 < len(layers) else None
        if any(other is not None and other.kind in NORMS for other in (before, after)):
            continue
        found: set[Link] = set()
        if before is not None and before.kind in WEIGHTED and before.shape[0] == layer.shape[0]:
            earlier = layers[at - 2] if at > 1 else None
            if earlier is not None and earlier.kind in WEIGHTED and earlier.shape[0] == layer.shape[0]:
                continue
            found.add(("post", before.index))
        if after is not None and after.kind in WEIGHTED and len(after.shape) > 1 and after.shape[1] == layer.shape[0]:
            found.add(("pre", after.index))
        if found:
            links[layer.index] = found
    return links


_NUMBER = re.compile(r"(\d+)$")


def links_by_names(layers: Sequence[Layer]) -> dict[int, int]:
    """Norm -> its layer, from names alone: `conv1` and `bn1`, Sequential `0` and `1`, or, where there are no numbers, the only
    layer of a module with as many outputs (`conv_stem` and `bn1`), if no other norm there has that size. That the sizes fit says nothing of a layer norm
    that shares its module with others that hold layers: MobileViT's stands behind the blocks beside it, not behind the convolution."""
    inside: dict[str, list[Layer]] = defaultdict(list)
    parents = Counter(parent for layer in layers for parent in _parents(layer.path))
    for layer in layers:
        if layer.kind in (*WEIGHTED, *NORMS) and layer.shape and not layer.flat:
            inside[layer.path.rpartition(".")[0]].append(layer)
    links = {}
    for path, siblings in inside.items():
        closed = parents[path] == len(siblings)
        weighted = [layer for layer in siblings if layer.kind in WEIGHTED]
        norms = [layer for layer in siblings if layer.kind in NORMS]
        for norm in norms:
            mates = [other for other in weighted if _numbers_agree(other, norm)]
            if not mates and (norm.kind == "bn" or closed) and sum(other.shape == norm.shape for other in norms) == 1:
                mates = [other for other in weighted if other.shape[0] == norm.shape[0]]
            if len(mates) == 1 and mates[0].shape[0] == norm.shape[0]:
                links[norm.index] = mates[0].index
    return links


def _parents(path: str) -> list[str]:
    parts = path.split(".")[:-1]
    return ["", *(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))]


def _numbers_agree(other: Layer, norm: Layer) -> bool:
    ours, theirs = (layer.path.rpartition(".")[2] for layer in (other, norm))
    a, b = _NUMBER.search(ours), _NUMBER.search(theirs)
    if a is None or b is None:
        return False
    if ours.isdigit() and theirs.isdigit():
        return int(ours) + 1 == int(theirs)
    return a.group(1) == b.group(1) and not ours.isdigit() and not theirs.isdigit()


Candidates = dict[int, list[int | None]]
"""Target layer -> source layers it could be paired with; None among them: it could stay alone."""

Neighbours = tuple[Mapping[int, set[int]], Mapping[int, set[int]]]
"""(layers that feed a layer, layers that it feeds)."""

_NONE: frozenset[int] = frozenset()


def prune_by_dataflow(candidates: Candidates, certain: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    """Drop candidates whose neighbours contradict certain pairs; whether any was dropped. Never the last one."""
    changed = False
    for j, options in candidates.items():
        if j in certain:
            continue
        kept = [i for i in options if i is None or _no_neighbour_missing(i, j, certain, ours, theirs)]
        if len(kept) < len(options) and any(i is not None for i in kept):
            candidates[j] = kept
            changed = True
    return changed


def _no_neighbour_missing(i: int, j: int, certain: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    return all(
        {certain[other] for other in their_side.get(j, _NONE) if other in certain} <= our_side.get(i, set()) for our_side, their_side in zip(ours, theirs)
    )


def complete_by_dataflow(
    source: Sequence[Layer],
    target: Sequence[Layer],
    certain: Mapping[int, int],
    source_flow: Dataflow,
    target_flow: Dataflow,
) -> dict[int, int]:
    """New pairs: layers of one shape that have certain neighbours on all the same sides, and no rival that has."""
    ours, theirs = producers(source, source_flow), producers(target, target_flow)
    known = dict(certain)
    new: dict[int, int] = {}
    while True:
        found = _pinned(source, target, known, ours, theirs)
        if not found:
            return new
        known.update(found)
        new.update(found)


def _pinned(source: Sequence[Layer], target: Sequence[Layer], known: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> dict[int, int]:
    used = set(known.values())
    back = {i: j for j, i in known.items()}
    options: dict[int, list[int]] = {}
    for layer in target:
        if layer.index in known or layer.kind == "buffer":
            continue
        fits = [
            other.index
            for other in source
            if other.index not in used and other.signature == layer.signature and _corresponds(other.index, layer.index, known, back, ours, theirs)
        ]
        if fits:
            options[layer.index] = fits
    wanted = Counter(i for fits in options.values() for i in fits)
    return {j: fits[0] for j, fits in options.items() if len(fits) == 1 and wanted[fits[0]] == 1}


def _corresponds(i: int, j: int, known: Mapping[int, int], back: Mapping[int, int], ours: Neighbours, theirs: Neighbours) -> bool:
    """Whether all certain neighbours of each are neighbours of the other, with at least one."""
    support = 0
    for our_side, their_side in zip(ours, theirs):
        around_i, around_j = our_side.get(i, set()), their_side.get(j, set())
        wanted = {known[other] for other in around_j if other in known}
        returned = {back[other] for other in around_i if other in back}
        if not wanted <= around_i or not returned <= around_j:
            return False
        support += len(wanted)
    return support > 0


class Mates:
    """`ours`, `theirs`: norm -> the one layer that it follows, in the source and in the target."""

    def __init__(self, source: Side, target: Side) -> None:
        self.ours, self.theirs = _layers(source), _layers(target)
        self._shapes = {layer.index: layer.signature for layer in source.layers}, {layer.index: layer.signature for layer in target.layers}

    def agree(self, i: int, j: int, certain: Mapping[int, int]) -> bool:
        """Whether source norm `i` and target norm `j` follow layers that are each other's."""
        owner, mate = self.theirs.get(j), self.ours.get(i)
        return owner is not None and mate is not None and certain.get(owner) == mate

    def pairs(self, certain: Mapping[int, int]) -> dict[int, int]:
        """Target -> source for norms of one shape behind layers that are each other's, where each is the only one behind its layer."""
        alone = Counter(self.ours.values()), Counter(self.theirs.values())
        behind = {owner: i for i, owner in self.ours.items() if alone[0][owner] == 1}
        found = {}
        for j, owner in self.theirs.items():
            if owner not in certain or alone[1][owner] != 1:
                continue
            i = behind.get(certain[owner])
            if i is not None and self._shapes[0][i] == self._shapes[1][j]:
                found[j] = i
        return found


def _layers(side: Side) -> dict[int, int]:
    if side.flow is None:
        return links_by_names(side.layers)
    posts = {norm: [other for way, other in sorted(found) if way == "post"] for norm, found in links_by_dataflow(side.layers, side.flow).items()}
    return {norm: layers[0] for norm, layers in posts.items() if len(layers) == 1}


@dataclass
class Side:
    layers: list[Layer]
    flow: Dataflow | None


def graph_colours(layers: Sequence[Layer], flow: Dataflow) -> dict[int, int]:
    """Weisfeiler-Leman colours of the dataflow: layers of one colour cannot be told apart by shapes and connections."""
    before, after = producers(layers, flow)
    colours = _numbered({layer.index: (loose_signature(layer), tuple(sorted(layer.roles))) for layer in layers})
    for _ in range(len(layers)):
        refined = _numbered(
            {
                index: (
                    colour,
                    tuple(sorted(colours[other] for other in before[index] if other in colours)),
                    tuple(sorted(colours[other] for other in after[index] if other in colours)),
                )
                for index, colour in colours.items()
            }
        )
        if len(set(refined.values())) == len(set(colours.values())):
            return refined
        colours = refined
    return colours


def _numbered(values: Mapping[int, object]) -> dict[int, int]:
    """Small numbers for equal values, in an order that does not depend on hashing."""
    numbers: dict[str, int] = {}
    return {index: numbers.setdefault(repr(value), len(numbers)) for index, value in values.items()}
