"""The network that weights go into, as names, shapes, layers and (lazily) the order in which it uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from dtl.checkpoint.transfer.layers.trace import Dataflow, trace_dataflow
from dtl.checkpoint.transfer.layers.units import Entry, Unit, entries_of, units_of


@dataclass
class Target:
    """`ties`: second names of a tensor that two modules share -> its first name."""

    entries: list[Entry]
    units: list[Unit]
    ties: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = None
    image_size: int | None = None
    trace: bool = True

    @cached_property
    def dataflow(self) -> Dataflow | None:
        """Execution order and producers, from a run on the meta device; None for a bare dict or a network that cannot run there."""
        if self.module is None or not self.trace:
            return None
        return trace_dataflow(self.module, image_size=self.image_size)


def target_of(model: nn.Module | Mapping[str, torch.Tensor], *, image_size: int | None = None, trace: bool = True) -> Target:
    if not isinstance(model, nn.Module):
        entries = entries_of(model)
        return Target(entries, units_of(entries))
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and first.setdefault(id(value), name) != name:
            ties[name] = first[id(value)]
    entries = entries_of(state)
    return Target(entries, units_of(entries), ties, model, image_size, trace)
