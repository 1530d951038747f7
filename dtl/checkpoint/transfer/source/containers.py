"""Which mapping inside a loaded file is the state dict, and which of several was meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dtl.checkpoint.transfer.layers.names import strip_wrappers
from dtl.errors import UserError
from dtl.text import counted

# State of other things than the network: never looked into.
_NOT_WEIGHTS = (
    "optim",
    "sched",
    "scaler",
    "amp",
    "rng",
    "loops",
    "callbacks",
    "hparams",
    "hyper",
    "momentum",
    "sampler",
    "criterion",
    "loss",
)


@dataclass(frozen=True)
class Contents:
    """A state dict found in a file. `container`: the words that led to it, joined by `/` ("" for a flat file).

    `prefix` is what of the user's key was no container: the beginning of names. `passed_over` names the other mappings
    of tensors and the entries that are no tensors.
    """

    tensors: dict[str, torch.Tensor]
    container: str
    prefix: str
    passed_over: tuple[str, ...]


def find_state_dict(loaded: Any, *, key: str | None, origin: str) -> Contents:
    """The state dict in what a file held. Two that could be meant, and no `key`: a UserError naming both."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{origin}: holds a {type(loaded).__name__}, not a state dict; save `model.state_dict()` instead")
    candidates = _candidates(loaded)
    if not candidates:
        raise UserError(f"{origin}: holds no tensors (top-level keys: {_list(loaded)}); a state dict is needed")
    prefix = ""
    if key is None:
        container = _choose(candidates, origin)
    else:
        container, prefix = _by_key(candidates, key, origin)
    tensors = {name: value for name, value in _descend(loaded, container).items() if isinstance(name, str)}
    found = {name: as_tensor(value) for name, value in tensors.items() if _is_tensor(value)}
    beside = [other or "(top level)" for other in candidates if other != container]
    beside += [name for name, value in tensors.items() if not _is_tensor(value) and not isinstance(value, Mapping)]
    return Contents(found, container, prefix, tuple(beside))


def without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`module.` and the like taken out of all names, unless two names would become one."""
    short = [strip_wrappers(name) for name in tensors]
    if len(set(short)) < len(short):
        return tensors
    return dict(zip(short, tensors.values()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "shape") and hasattr(value, "dtype"))


def as_tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.as_tensor(value)
    return value.detach() if value.layout == torch.strided else value.detach().to_dense()


def _candidates(loaded: Mapping[Any, Any]) -> dict[str, int]:
    """container -> number of tensors in it, in the file's order."""
    found: dict[str, int] = {}

    def look(mapping: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        tensors = sum(_is_tensor(value) for name, value in mapping.items() if isinstance(name, str))
        if tensors:
            found["/".join(path)] = tensors
        if len(path) >= 6 or tensors > 0.5 * len(mapping):
            return
        for name, value in mapping.items():
            if isinstance(name, str) and isinstance(value, Mapping) and not name.lower().startswith(_NOT_WEIGHTS):
                look(value, (*path, name))

    look(loaded, ())
    return found


def _choose(candidates: dict[str, int], origin: str) -> str:
    most = max(candidates.values())
    # As many tensors, or nearly: a second network of the same kind (an average of weights, a teacher).
    rivals = [container for container, count in candidates.items() if count >= 0.9 * most and (count > 4 or count == most)]
    if len(rivals) > 1:
        named = " and ".join(f"'{container}' ({counted(candidates[container], 'tensor')})" for container in rivals)
        raise UserError(f"{origin}: holds {named}; say which one is meant, for instance source: {origin}#{rivals[0]}")
    return rivals[0]


def _by_key(candidates: dict[str, int], key: str, origin: str) -> tuple[str, str]:
    """(container, prefix of names): `model_ema`, `model/state_dict`, `encoder_q.` or `state_dict/encoder_q.`."""
    if key in candidates:
        return key, ""
    outer, _, inner = key.rpartition("/")
    ending = [container for container in candidates if container.split("/")[-1] == key]
    if len(ending) == 1:
        return ending[0], ""
    if inner.endswith("."):
        if outer in candidates:
            return outer, inner
        if not outer:
            return _choose(candidates, origin), inner
    names = ", ".join(f"'{container}'" for container in candidates if container) or "none"
    raise UserError(f"{origin}: no state dict under '{key}'; found: {names}. A prefix of names ends in a dot, as in #encoder_q.")


def _descend(loaded: Mapping[Any, Any], container: str) -> Mapping[Any, Any]:
    inner: Any = loaded
    for word in container.split("/") if container else []:
        inner = inner[word]
    result: Mapping[Any, Any] = inner
    return result


def _list(loaded: Mapping[Any, Any]) -> str:
    return ", ".join(repr(key) for key in list(loaded)[:8]) or "none"
