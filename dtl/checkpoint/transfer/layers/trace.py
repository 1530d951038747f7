"""The order in which a network uses its tensors, and which layers feed which: one forward pass on the meta device.

Registration order is a habit of whoever wrote the module; execution order is what the function is. No memory is allocated and
no arithmetic done: the module is copied with every tensor replaced by a meta tensor, and a `TorchFunctionMode` watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
        twin = original.__new__(type(original))
        copies[id(original)] = twin
        twin.__dict__ = original.__dict__.copy()
        twin.__dict__["training"] = False
        twin.__dict__["_parameters"] = {name: tensor(value) for name, value in original._parameters.items()}
        twin.__dict__["_buffers"] = {name: tensor(value) for name, value in original._buffers.items()}
        twin.__dict__["_modules"] = {name: child and shadow(child) for name, child in original._modules.items()}
        return twin

    return shadow(module)


def trace_dataflow(module: nn.Module, *, image_size: int | None = None) -> Dataflow | None:
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


def _input_shapes(module: nn.Module, image_size: int | None) -> list[tuple[int, ...]]:
    """Inputs to try: images of the channels that a convolution takes, at the size the module hints at, else at common ones."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        widths = dict.fromkeys(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
        return [(2, width) for width in list(widths)[:8]]
    taken = dict.fromkeys(m.in_channels for m in convolutions)
    # The first one registered is nearly always the one that sees the image; else one that takes as many channels as images have.
    channels = [next(iter(taken)), *(count for count in (3, 1, 4, 2) if count in taken)]
    sizes = dict.fromkeys([size for size in (image_size, *_size_hints(module)) if size] + list(_SIZES))
    return [(2, count, size, size) for count in dict.fromkeys(channels) for size in sizes]


def _size_hints(module: nn.Module) -> list[int | None]:
    """Where torchvision and timm keep the input size of networks that take no other."""
    config = getattr(module, "default_cfg", None)
    size = config.get("input_size", (None,)) if isinstance(config, dict) else None
    places = (getattr(getattr(module, "patch_embed", None), "img_size", None), getattr(module, "image_size", None))
    return [_last_size(value) for value in (*places, getattr(module, "img_size", None), size)]


def _last_size(value: Any) -> int | None:
    if isinstance(value, (tuple, list)) and value:
        value = value[-1]
    return value if isinstance(value, int) and value > 0 else None
