"""Activation checkpointing: a block's inner activations are computed again in the backward pass instead of being kept.

About a third more compute for a fraction of the memory. Parameter names, results, gradients, random draws (dropout, stochastic depth)
and running statistics stay what they are without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtl.errors import UserError
from dtl.models.groups import block_names
from dtl.models.network import Network


def enable_activation_checkpointing(network: Network) -> list[str]:
    """Checkpoint every block of the network (residual block, transformer layer ...); returns the blocks' names.

    Call it before the DDP wrap. It acts in train mode only, and only where a gradient is needed.
    """
    names = block_names(network)
    if not names:
        raise UserError(f"model {network.name} has no blocks to checkpoint; set model.checkpoint_activations: false")
    for name in names:
        block = network.module.get_submodule(name)
        block.__dict__["forward"] = _Checkpointed(block)
    return names


class _Checkpointed:
    """Stands in for one block's `forward`: an attribute of the instance, so that the tree of names stays as it is.

    An object that refers to its module, not a closure, so that deepcopy and pickle carry it along.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        forward = type(self.block).forward
        if not (torch.is_grad_enabled() and _needs_gradient(self.block, inputs)):
            return forward(self.block, *inputs, **keywords)
        # DenseNet's blocks pass one growing list from layer to layer; the recomputation needs it as it was.
        inputs = tuple(list(value) if isinstance(value, list) else value for value in inputs)
        if torch.compiler.is_compiling():
            # The compiler writes buffers back once, after the graph, and takes no context of ours.
            return checkpoint(forward, self.block, *inputs, use_reentrant=False, **keywords)
        return checkpoint(forward, self.block, *inputs, use_reentrant=False, context_fn=self._contexts, **keywords)

    def _contexts(self) -> tuple[Any, Any]:
        """Contexts of the first forward pass, and of its recomputation."""
        return contextlib.nullcontext(), _statistics_untouched(self.block)


@contextlib.contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """The recomputation writes into copies of the buffers, so that a norm does not count its batch twice.

    Copies and not `track_running_stats=False`: checkpoint wants the same number of saved tensors both times.
    """
    own = [(part, dict(part._buffers)) for part in block.modules() if part.training and part._buffers]
    for part, buffers in own:
        part._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.update(buffers)


def _needs_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether there is anything to save: something to differentiate, and real memory (shapes alone need none)."""
    tensors = [tensor for value in inputs for tensor in (value if isinstance(value, (list, tuple)) else (value,))]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return False
    return any(tensor.requires_grad for tensor in tensors) or any(parameter.requires_grad for parameter in block.parameters())
