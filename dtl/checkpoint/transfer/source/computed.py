"""Weights that a file holds in parts: weight_norm and spectral_norm, as parametrisations and as before torch 2, and pruning masks.

The network multiplies the parts at each forward pass; a network without the parametrisation needs the product. What has parts that are not known here
is refused by name, because a part alone (`original1`, `weight_v`) has the shape of a weight and is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from dtl.errors import UserError
from dtl.text import some

_PARAMETRISED = re.compile(r"^(?:(?P<path>.*)\.)?parametrizations\.(?P<name>\w+)\.(?P<part>original\d?|\d+\..+)$")
_OLD = re.compile(r"^(?P<whole>.*\w)_(?P<part>orig|mask|g|u|v)$")
Parts = dict[str, torch.Tensor]


def computed(tensors: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The tensors with each weight in place of its parts. UserError where the parts are not known."""
    parts = _parts(tensors)
    whole = {name: value for name, found in parts.items() if (value := _product(name, found, origin)) is not None}
    used = {key for name in whole for key in _keys(tensors, name)}
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if key not in used:
            out[key] = value
            continue
        name = _whole(key)
        if name is not None and name not in out:
            out[name] = whole[name]
    return out


def _whole(key: str) -> str | None:
    """The tensor that a part belongs to."""
    if found := _PARAMETRISED.match(key):
        return f"{found['path']}.{found['name']}" if found["path"] else found["name"]
    return found["whole"] if (found := _OLD.match(key)) else None


def _part(key: str) -> str:
    found = _PARAMETRISED.match(key) or _OLD.match(key)
    assert found is not None
    return found["part"]


def _keys(tensors: Mapping[str, torch.Tensor], name: str) -> list[str]:
    return [key for key in tensors if _whole(key) == name]


def _parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for key, value in tensors.items():
        name = _whole(key)
        if name is not None and name not in tensors:
            found.setdefault(name, {})[_part(key)] = value
    return found


def _product(name: str, parts: Parts, origin: str) -> torch.Tensor | None:
    """None for names that only look like parts: `gate_v` alone is nothing of the kind."""
    for needed, compute in _KINDS.items():
        if set(parts) == set(needed) and all(value.is_floating_point() for value in parts.values()):
            return compute(*(parts[part] for part in needed))
    if any(part.startswith("original") for part in parts):
        raise UserError(
            f"{origin}: {name} is stored in parts ({some(sorted(parts))}), and what makes a weight of them is not known here; "
            "call torch.nn.utils.parametrize.remove_parametrizations on the network that they are from, and save its state_dict again"
        )
    return None


def _weight_norm(size: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """w = g * v / |v|, the norm over all dimensions that g does not have."""
    dims = [dim for dim in range(direction.dim()) if size.dim() == 0 or size.shape[dim] == 1]
    norm: torch.Tensor = torch.linalg.vector_norm(direction.float(), dim=dims, keepdim=True)
    whole: torch.Tensor = direction.float() * (size.float() / norm)
    return whole.to(direction.dtype)


def _spectral_norm(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """w / sigma with sigma = u' W v, as an eval pass computes it."""
    matrix = weight.float()
    if len(u) != weight.shape[0]:  # transposed convolutions are normalised by their outputs, which are dimension 1
        matrix = matrix.transpose(0, 1)
    sigma = torch.dot(u.float(), matrix.flatten(1).mv(v.float()))
    return (weight.float() / sigma).to(weight.dtype)


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weight * mask


_KINDS: dict[tuple[str, ...], Callable[..., torch.Tensor]] = {
    ("original0", "original1"): _weight_norm,
    ("g", "v"): _weight_norm,
    ("original", "0._u", "0._v"): _spectral_norm,
    ("orig", "u", "v"): _spectral_norm,
    ("orig", "mask"): _masked,
}
