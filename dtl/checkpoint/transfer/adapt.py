"""Adapters: named pure functions that make a tensor of one layer fit another, each keeping the function where that can be.

A plan names them as text (`stem_channels`, `split_0_of_3`), so that plans can be saved, edited and compared.
Letters: O output channels, I input channels, K classes, N tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import isqrt

import torch
from torch.nn import functional as F

from dtl.checkpoint.transfer.layers.units import Shape
from dtl.errors import UserError


def stem_channels(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """First convolution [O, I, kh, kw] for another number of input channels.

    One channel: the sum over the inputs, so that a gray image gives exactly what it gave as RGB of three equal channels.
    Else the channels are repeated in turn and scaled by I / new I, which keeps the size of the response.
    """
    if shape[1] == 1:
        return weight.sum(dim=1, keepdim=True)
    index = torch.arange(shape[1]) % weight.shape[1]
    return weight[:, index] * (weight.shape[1] / shape[1])


def squeeze(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Dimensions of size 1 put in or left out: a linear layer as 1x1 convolution, a layer scale [C, 1, 1] as [C]."""
    return tensor.reshape(shape)


def reshape_kernel(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Linear [O, I*kh*kw] <-> convolution [O, I, kh, kw]: VGG's first classifier layer, patch embeddings."""
    return weight.reshape(shape)


def resize_position_embedding(table: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[1, N, D] or [1, D, H, W] to another grid, bicubic with antialiasing; class tokens in front are kept as they are."""
    if table.dim() == 4:
        return _resize(table, (shape[2], shape[3]))
    have, want = _tokens_in_front(table.shape[1]), _tokens_in_front(shape[1])
    old, new = isqrt(table.shape[1] - have), isqrt(shape[1] - want)
    front, grid = table[:, :have], table[:, have:]
    if want < have:
        front = front[:, :want]
    elif want > have:
        raise UserError(f"position embedding of {table.shape[1]} tokens has no row for {want - have} token(s) in front")
    grid = _resize(grid.reshape(1, old, old, -1).permute(0, 3, 1, 2), (new, new))
    return torch.cat([front, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)


def _tokens_in_front(num_tokens: int) -> int:
    return next(extra for extra in (0, 1, 2) if isqrt(num_tokens - extra) ** 2 == num_tokens - extra)


def resize_relative_table(table: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Swin's relative position biases [(2s-1)^2, heads] for another window size."""
    old, new = isqrt(table.shape[0]), isqrt(shape[0])
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return _resize(grid, (new, new)).permute(0, 2, 3, 1).reshape(new * new, -1)


def resize_patches(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Patch embedding [O, I, p, p] for another patch size, by the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013).

    A patch that is resized and then embedded gives what the old patch gave, as nearly as any linear map can.
    """
    old, new = (weight.shape[2], weight.shape[3]), (shape[2], shape[3])
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    resize = _resize(basis, new).reshape(old[0] * old[1], new[0] * new[1])
    inverse = torch.linalg.pinv(resize)
    flat = weight.double().reshape(-1, old[0] * old[1])
    resized: torch.Tensor = (flat @ inverse.T).reshape(*weight.shape[:2], *new)
    return resized.to(weight.dtype)


def _resize(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    dtype = grid.dtype if grid.dtype in (torch.float32, torch.float64) else torch.float32
    return F.interpolate(grid.to(dtype), size=size, mode="bicubic", antialias=True, align_corners=False).to(grid.dtype)


def fuse(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Separate q, k, v as one projection [3D, D]."""
    return torch.cat(list(parts), dim=0)


def split(tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """One of q, k, v out of a fused projection."""
    return tensor.chunk(parts, dim=0)[part]


def transpose_kernel(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Kernels of other frameworks, output channels last: [kh, kw, I, O] -> [O, I, kh, kw], [I, O] -> [O, I]."""
    order = (3, 2, 0, 1) if weight.dim() == 4 else (1, 0)
    return weight.permute(order).reshape(shape)


def rows(tensor: torch.Tensor, picks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of a head [K, ...]: for each new class the mean of the old rows it picks (`heads.pick_rows`)."""
    return torch.stack([tensor[list(pick)].mean(dim=0) if len(pick) > 1 else tensor[pick[0]] for pick in picks])


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Mapping[str, torch.Tensor],
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of a convolution that does what convolution and BatchNorm (in eval mode) did together.

    W' = W * g / s and b' = beta + (b - mean) * g / s with s = sqrt(var + eps).
    """
    scale = norm["weight"].double() / torch.sqrt(norm["running_var"].double() + eps)
    shift = norm["bias"].double() - norm["running_mean"].double() * scale
    folded = weight.double() * scale.reshape(-1, *([1] * (weight.dim() - 1)))
    if bias is not None:
        shift = shift + bias.double() * scale
    return folded.to(weight.dtype), shift.to(weight.dtype)


_BY_SHAPE: dict[str, Callable[[torch.Tensor, Shape], torch.Tensor]] = {
    function.__name__: function
    for function in (
        stem_channels,
        squeeze,
        reshape_kernel,
        resize_position_embedding,
        resize_relative_table,
        resize_patches,
        transpose_kernel,
    )
}
_SPLIT = re.compile(r"^split_(\d)_of_(\d)$")
TRANSFORMS = (*_BY_SHAPE, "fuse", "split_0_of_3", "split_1_of_3", "split_2_of_3", "rows", "fold_norm_weight", "fold_norm_bias")


def is_transform(name: str) -> bool:
    return name == "" or name in TRANSFORMS or _SPLIT.match(name) is not None


def apply_transform(
    name: str,
    tensors: Sequence[torch.Tensor],
    shape: Shape,
    *,
    picks: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """The named transform of `tensors` (several for `fuse` and the folds), which must come out in `shape`; `picks` for `rows`."""
    if not name and len(tensors) == 1:
        return tensors[0]
    if name in _BY_SHAPE:
        return _BY_SHAPE[name](tensors[0], shape)
    if name == "fuse":
        return fuse(tensors)
    if found := _SPLIT.match(name):
        return split(tensors[0], int(found.group(1)), int(found.group(2)))
    if name == "rows" and picks is not None:
        return rows(tensors[0], picks)
    if name in ("fold_norm_weight", "fold_norm_bias"):
        return _fold(tensors)[0 if name.endswith("weight") else 1]
    raise UserError(f"transform: no way to do {name!r}; known are {', '.join(TRANSFORMS)}")


def _fold(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`tensors`: convolution weight, norm weight, bias, running mean, running variance, then perhaps the convolution's bias."""
    names = ("weight", "bias", "running_mean", "running_var")
    return fold_norm(tensors[0], tensors[5] if len(tensors) > 5 else None, dict(zip(names, tensors[1:5])))
