"""A state dict into a module, strictly: the same names and the same shapes, or a UserError in one line that names what differs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtl.errors import UserError

_SHOWN = 3  # names of each kind in the message


def strict_load(module: nn.Module, tensors: Mapping[str, Tensor], origin: str, *, name: str = "") -> None:
    """`module.load_state_dict(tensors)`. UserError with `origin` (the file, the checkpoint) and the network's `name` in it where names or shapes differ.

    Also where a weight is not a number: such a network computes, and gives class 0 for every image.
    """
    network = f"the network {name}" if name else "this network"
    check_tensors(module.state_dict(), tensors, f"{origin} does not match {network}")
    module.load_state_dict(dict(tensors))
    bad = not_finite(module)
    if bad is not None:
        raise UserError(f"{origin}: the tensor {bad} holds values that are not finite (NaN or infinite): the training probably diverged")


def not_finite(module: nn.Module) -> str | None:
    """The first parameter or running statistic that holds a NaN or an infinity; None where there is none. Other buffers may hold infinities (masks do)."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, nn.Parameter) or ".running_" in f".{name}":
            if not all_finite(tensor.detach()):
                return name
        elif tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            return name
    return None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these tensors, all on one device, that holds a NaN or an infinity. Where none does, the host waits for the device once."""
    sums = [tensor.sum().abs().float() for tensor in tensors.values() if tensor.is_floating_point() or tensor.is_complex()]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return None
    return next((name for name, tensor in tensors.items() if not all_finite(tensor)), None)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. A finite sum says so at a tenth of the cost of looking at each value."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """UserError that begins with `what` where `found` has other names or shapes than `expected`; types are not compared."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong_shape = [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    parts = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("wrong shape", wrong_shape)]
    if any(parts):
        raise UserError(f"{what}: {'; '.join(part for part in parts if part)}")


def _listed(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{kind}: {', '.join(items[:_SHOWN])}{more}"
