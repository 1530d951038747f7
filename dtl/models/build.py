"""A network by name, with its head found, ready for any number of classes. Nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from dtl.errors import UserError
from dtl.models import catalog
from dtl.models.catalog import model_names
from dtl.models.heads import heads_by_sentinel, heads_by_tracing, is_classifier, replace_head
from dtl.models.init import Init, initialize
from dtl.models.meta import build_on_meta
from dtl.models.network import Network, forward_logits
from dtl.models.preprocessing import Preprocessing

__all__ = ["Network", "Preprocessing", "build", "forward_logits", "model_names", "replace_head"]


def build(name: str, *, num_classes: int, init: Init = "default", options: dict[str, Any] | None = None, meta: bool = False) -> Network:
    """Build the network `name` with fresh values.

    `options` go to its constructor, but for `head`: the dotted name of the head's layer, for a function whose head is not found by itself.
    With `meta` only shapes exist: for plans and tables that need no memory.
    """
    if num_classes < 1:
        raise UserError(f"model {name!r}: the number of classes must be at least 1, not {num_classes}")
    if init not in ("default", "xavier", "kaiming"):
        raise UserError(f"model.init must be default, xavier or kaiming, not {init!r}")
    entry = catalog.find(name)
    options = {**entry.options, **(options or {})}
    arguments = {key: value for key, value in options.items() if key != "head"}

    def construct(count: int) -> nn.Module:
        return _construct(entry, count, arguments)

    module = build_on_meta(lambda: construct(num_classes)) if meta else construct(num_classes)
    preprocessing = entry.preprocessing(module)
    heads = _find_heads(entry, module, construct, options, image_size=preprocessing.image_size)
    network = Network(module=module, name=entry.name, heads=heads, preprocessing=preprocessing, options=options)
    if network.num_outputs != num_classes:
        replace_head(network, num_classes)
    if not meta:
        initialize([module], init)
    return network


def _construct(entry: catalog.Entry, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    count = {"num_classes": num_classes} if entry.takes_num_classes else {}
    try:
        module = entry.construct(**count, **arguments)
    except (TypeError, ValueError) as error:
        if not arguments:
            raise
        raise UserError(f"model {entry.name!r} cannot be built with the options {arguments}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"model {entry.name!r}: the function returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def _find_heads(entry: catalog.Entry, module: nn.Module, construct: Any, options: dict[str, Any], *, image_size: int) -> tuple[str, ...]:
    advice = "name its layer with the option head, for instance {head: fc}"
    if "head" in options:
        return _chosen_head(entry.name, module, str(options["head"]))
    heads: tuple[str, ...] = ()
    if entry.takes_num_classes:
        heads = _known_heads(entry.name, repr(sorted(options.items())), functools.partial(construct))
    if not heads:
        try:
            heads = heads_by_tracing(module, image_size)
        except Exception as error:
            raise UserError(f"model {entry.name!r}: its head was not found ({type(error).__name__}: {error}); {advice}") from error
    if not heads:
        raise UserError(f"model {entry.name!r}: no linear layer or 1x1 convolution gives its output; {advice}")
    return heads


_heads_of: dict[tuple[str, str], tuple[str, ...]] = {}


def _known_heads(name: str, options: str, construct: Any) -> tuple[str, ...]:
    """Found once a process for each network and its options."""
    if (name, options) not in _heads_of:
        _heads_of[name, options] = heads_by_sentinel(construct)
    return _heads_of[name, options]


def _chosen_head(name: str, module: nn.Module, head: str) -> tuple[str, ...]:
    layers = dict(module.named_modules())
    if head not in layers or not is_classifier(layers[head]):
        near = catalog.nearest(head, [key for key, layer in layers.items() if is_classifier(layer)])
        raise UserError(f"model {name!r}: the option head names {head!r}, which is no linear layer or 1x1 convolution of it{near}")
    return (head,)
