"""Modules on the meta device: only shapes exist, so the largest network is built in a fraction of a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_ALLOCATORS = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
# Initialisation takes half of the time of a build, and on the meta device there is nothing to fill. Some of nn.init's functions call parts that
# the mode does not see, so they are intercepted themselves.
_FILLERS = frozenset(getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"))
_INITIALISERS = frozenset({nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_})


class _AllocateOnMeta(TorchFunctionMode):
    """Sends new parameters to the meta device, and leaves arithmetic alone.

    `with torch.device("meta")` catches arange and linspace too, and constructors that compute with them fail
    (torchvision's RegNet works out its widths in tensors).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ALLOCATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func in _FILLERS or func in _INITIALISERS:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def build_on_meta(constructor: Callable[[], nn.Module]) -> nn.Module:
    """The constructor's module with every tensor on the meta device."""
    try:
        with _AllocateOnMeta():
            module = constructor()
    except (RuntimeError, NotImplementedError):
        # A constructor that mixes its parameters with computed values needs real memory. A mistake of the caller fails again here.
        module = constructor()
    return module.to("meta")


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device, made without copying any data."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)
