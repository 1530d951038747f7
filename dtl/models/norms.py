"""Batch norms on several ranks: SyncBatchNorm, which computes the statistics of a training step over the images of all ranks.

Only the norms that gather statistics are converted, and each back again once a phase does not want it: what a phase's norms are never depends on
the phases before it. torch's converter makes a bare SyncBatchNorm of every subclass: of timm's `BatchNormAct2d` it drops the activation without a
word (timm#1254, pytorch#187298). So a type with a forward of its own is converted by who knows it, or not at all, and outputs are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtl.config.models import ImageSize
from dtl.models.network import eval_mode, forward_logits, image_shape
from dtl.text import counted, some

_PLAIN = "_dtl_plain"
"""Where a converted norm keeps the one that it stands for; in its `__dict__`, so that it is no part of the network."""
_TOLERANCE = 1e-3


def gathering_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that compute with statistics of the batch, by name: those in train mode."""
    return {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.training}


def plain_norms(module: nn.Module) -> frozenset[str]:
    """Undo `synchronise_norms`; the names of the norms that it had converted. Parameters and buffers stay the tensors that they are."""
    converted = {name: part for name, part in module.named_modules() if _PLAIN in part.__dict__}
    for part in converted.values():
        plain = part.__dict__[_PLAIN]
        plain._parameters, plain._buffers = part._parameters, part._buffers
        plain.train(part.training)
    _replace(module, {part: part.__dict__[_PLAIN] for part in converted.values()})
    return frozenset(converted)


def synchronise_norms(module: nn.Module, *, image_size: ImageSize, agree: Callable[[bool], bool]) -> tuple[frozenset[str], str]:
    """Make SyncBatchNorm of the norms that gather statistics: their names, and a line about those that are left as they are ("" where none is).

    An eval forward of two images before and after it must give the same outputs, or all is undone; `agree` makes that one answer for all ranks.
    """
    norms = {name: norm for name, norm in gathering_norms(module).items() if not isinstance(norm, nn.SyncBatchNorm)}
    made = {name: new for name, norm in norms.items() if (new := _synchronised(norm)) is not None}
    left = [f"{name} ({type(norm).__name__})" for name, norm in norms.items() if name not in made]
    line = ""
    if left:
        keeps, them = ("keeps", "it") if len(left) == 1 else ("keep", "them")
        line = f"SyncBatchNorm: {some(left)} {keeps} the statistics of each rank: there is no synchronised form of {them}"
    if not made:
        return frozenset(), line
    before = _eval_outputs(module, image_size)
    for name, new in made.items():
        new.__dict__[_PLAIN] = norms[name]
    _replace(module, {norms[name]: new for name, new in made.items()})
    after = _eval_outputs(module, image_size)
    margin = _TOLERANCE * float(before.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    if agree(torch.allclose(after, before, rtol=_TOLERANCE, atol=margin, equal_nan=True)):
        return frozenset(made), line
    plain_norms(module)
    keeps = "keeps" if len(norms) == 1 else "keep"
    return frozenset(), f"SyncBatchNorm would change what this network computes: its {counted(len(norms), 'norm')} {keeps} the statistics of each rank"


def moved_norms(module: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> list[str]:
    """The names of the batch norms whose running statistics are not the same at both ends."""
    norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
    return [name for name in norms if any(key in start and not torch.equal(start[key], end[key]) for key in (f"{name}.running_mean", f"{name}.running_var"))]


def statistics_of_batch(norms: Sequence[_BatchNorm], forward: Callable[[], object]) -> Tensor:
    """Mean and variance [2, C over all `norms`] float64 that the images of one forward pass have at these norms, which normalise with them; the rest of the
    network computes in the mode that it is in. The running statistics of `norms` are those of the pass afterwards; nothing else of them changes."""
    before = [(norm, norm.momentum, norm.training, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
            norm.momentum, norm.training = None, True  # the mean of all of the pass, where a norm is used more than once
        with norms_alone():
            forward()
        return torch.stack([torch.cat([getattr(norm, name).double() for norm in norms]) for name in ("running_mean", "running_var")])
    finally:
        for norm, momentum, training, tracked in before:
            norm.momentum, norm.training, norm.num_batches_tracked = momentum, training, tracked


@contextmanager
def norms_alone() -> Iterator[None]:
    """Within it, SyncBatchNorm layers use the statistics of this rank alone: no collective, and on any device."""
    synchronised = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = synchronised  # type: ignore[method-assign]


@contextmanager
def no_rank_is_empty() -> Iterator[None]:
    """Within it SyncBatchNorm does not look for ranks without images: the host would wait for its device at each norm (pytorch#78656).

    Every rank has images: micro-batches are of one size. torch leaves the search out where a CUDA graph is captured, so that is what it gets as an answer.
    """
    captures = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = captures


def _synchronised(norm: _BatchNorm) -> nn.Module | None:
    """A SyncBatchNorm with the parameters and buffers of `norm`, or None where none computes what it computes."""
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__:
        return None
    if type(norm).forward is _BatchNorm.forward:
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return made
    layers = sys.modules.get("timm.layers")  # where a norm is timm's, timm is imported
    if layers is not None and type(norm) is layers.BatchNormAct2d:
        made = layers.convert_sync_batchnorm(norm)
        return made
    return None


def _replace(module: nn.Module, by: dict[nn.Module, nn.Module]) -> None:
    """Under every name that it has: a norm may be shared."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in by:
                parent._modules[name] = by[child]


def _eval_outputs(module: nn.Module, image_size: ImageSize) -> Tensor:
    """Of two images of noise, the same ones each time."""
    images = torch.randn(image_shape(module, 2, image_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), eval_mode(module):
        logits, _ = forward_logits(module, images.to(next(module.parameters()).device))
    return logits.float()
