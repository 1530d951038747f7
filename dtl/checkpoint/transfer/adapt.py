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

from dtl.checkpoint.transfer.layers.layer import (
    Grid,
    Shape,
    distances_transform,
    has_heads_first,
    is_axis_table,
    is_position_table,
    is_relative_table,
    num_elements,
    position_transform,
    relative_transform,
    rows_in_front,
    squeezed,
)
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
    """[1, N, D], [1, D, H, W] or [1, H, W, D] to another square grid, bicubic with antialiasing; class tokens in front are kept as they are."""
    if table.dim() == 4 and table.shape[1] != shape[1]:
        return _resize(table.permute(0, 3, 1, 2), (shape[1], shape[2])).permute(0, 2, 3, 1)
    if table.dim() == 4:
        return _resize(table, (shape[2], shape[3]))
    have, want = _tokens_in_front(table.shape[1]), _tokens_in_front(shape[1])
    old, new = isqrt(table.shape[1] - have), isqrt(shape[1] - want)
    front, grid = table[:, :have], table[:, have:]
    if want < have:
        front = front[:, :want]
    elif want > have:
        raise UserError(f"the position embedding has {table.shape[1]} tokens and lacks {want - have} class token(s) in front of the grid")
    grid = _resize(grid.reshape(1, old, old, -1).permute(0, 3, 1, 2), (new, new))
    return torch.cat([front, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)


def resize_positions_to(table: torch.Tensor, shape: Shape, grid: Grid) -> torch.Tensor:
    """[1, N, D] of a square grid to the rows of another one. Rows in front (class token, registers) are kept, as many as there is room for."""
    room = shape[1] - grid[0] * grid[1]
    have = rows_in_front(table.shape[1], room)
    if have is None:
        raise UserError(f"the position embedding has {table.shape[1]} tokens, which are no square with {room} or more in front of it")
    side = isqrt(table.shape[1] - have)
    resized = _resize(table[:, have:].reshape(1, side, side, -1).permute(0, 3, 1, 2), grid)
    return torch.cat([table[:, :room], resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)], dim=1)


def add_position(token: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A class token [1, 1, D] with its row of the position embedding, for a network whose table has no such row: what the first block sees is the same."""
    return token + table[:, :1].reshape(token.shape)


def zero_position(table: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[1, N, D] without a row for the class token, for a network whose table has one: zero, since the token was used without a position."""
    return resize_position_embedding(torch.cat([table.new_zeros(1, _tokens_in_front(shape[1]), table.shape[2]), table], dim=1), shape)


def _tokens_in_front(num_tokens: int) -> int:
    return next(extra for extra in (0, 1, 2) if isqrt(num_tokens - extra) ** 2 == num_tokens - extra)


def resize_relative_table(table: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Swin's relative position biases [(2s-1)^2, heads] for another window size, MaxViT's [heads, 2h-1, 2w-1], or LambdaNetworks' [2h-1, 2w-1, heads]."""
    if table.dim() == 3 and has_heads_first(tuple(table.shape), shape):
        return _resize(table[None], (shape[1], shape[2]))[0]
    if table.dim() == 3:
        return _resize(table[None].permute(0, 3, 1, 2), (shape[0], shape[1]))[0].permute(1, 2, 0)
    old, new = isqrt(table.shape[0]), isqrt(shape[0])
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return _resize(grid, (new, new)).permute(0, 2, 3, 1).reshape(new * new, -1)


def resize_distances_to(table: torch.Tensor, shape: Shape, grid: Grid) -> torch.Tensor:
    """[(2s-1)^2 + extra, heads] to another grid of distances; the extra rows (BEiT's class token) stay at the end as they are."""
    extra = shape[0] - grid[0] * grid[1]
    side = isqrt(table.shape[0] - extra)
    resized = _resize(table[: side**2].reshape(1, side, side, -1).permute(0, 3, 1, 2), grid)
    return torch.cat([resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1), table[side**2 :]])


def resize_biases_to(table: torch.Tensor, shape: Shape, grid: Grid) -> torch.Tensor:
    """Biases by distance without its sign, [heads, h * w] of a square, to another grid of distances."""
    side = isqrt(table.shape[1])
    return _resize(table.reshape(1, -1, side, side), grid).reshape(-1, grid[0] * grid[1])


def resize_relative_axis(table: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Embeddings of the distances along one axis, [2s-1, D], for another number of them: linear, as SAM's and MViT's own code does."""
    return F.interpolate(table.float().T[None], size=shape[0], mode="linear")[0].T.to(table.dtype)


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


def split(tensor: torch.Tensor, first: int, last: int, parts: int) -> torch.Tensor:
    """One of q, k, v out of a fused projection, or k and v of a network that has these fused."""
    rows = tensor.shape[0] // parts
    return tensor[first * rows : (last + 1) * rows]


def transpose_kernel(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Kernels of other frameworks, output channels last: [kh, kw, I, O] -> [O, I, kh, kw], [I, O] -> [O, I]."""
    order = (3, 2, 0, 1) if weight.dim() == 4 else (1, 0)
    return weight.permute(order).reshape(shape)


def transpose_stem(weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Such a kernel [kh, kw, I, O] of the first convolution, for another number of input channels."""
    return stem_channels(weight.permute(3, 2, 0, 1), shape)


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
        zero_position,
        resize_relative_table,
        resize_relative_axis,
        resize_patches,
        transpose_kernel,
        transpose_stem,
    )
}
_SPLIT = re.compile(r"^split_(\d)(?:_to_(\d))?_of_([1-9])$")
_TO_GRID = re.compile(r"^(resize_position_embedding|resize_relative_table|resize_attention_biases)_(\d{1,5})x(\d{1,5})$")
# Of tables whose target grid is in the name: how they are resized, when they can be, and what they are.
_GRIDS: dict[str, tuple[Callable[[torch.Tensor, Shape, Grid], torch.Tensor], Callable[[Shape, Shape, Grid], str | None], str]] = {
    "resize_position_embedding": (resize_positions_to, position_transform, "[1, N, D] position embeddings"),
    "resize_relative_table": (resize_distances_to, relative_transform, "[(2s-1)^2 + extra, heads] tables"),
    "resize_attention_biases": (resize_biases_to, distances_transform, "[heads, N] attention biases"),
}
TRANSFORMS = (
    *_BY_SHAPE,
    "add_position",
    "fuse",
    "split_0_of_3",
    "split_1_of_3",
    "split_2_of_3",
    "split_1_to_2_of_3",
    "rows",
    "fold_norm_weight",
    "fold_norm_bias",
)


def is_transform(name: str) -> bool:
    return name == "" or name in TRANSFORMS or _SPLIT.match(name) is not None or _TO_GRID.match(name) is not None


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
    if name == "add_position":
        return add_position(*tensors)
    if found := _TO_GRID.match(name):
        return _GRIDS[found.group(1)][0](tensors[0], shape, (int(found.group(2)), int(found.group(3))))
    if found := _SPLIT.match(name):
        return split(tensors[0], *_parts(found))
    if name == "rows" and picks is not None:
        return rows(tensors[0], picks)
    if name in ("fold_norm_weight", "fold_norm_bias"):
        return _fold(tensors)[0 if name.endswith("weight") else 1]
    raise UserError(f"unknown transform {name!r}; known transforms are {', '.join(TRANSFORMS)}")


def _parts(found: re.Match[str]) -> tuple[int, int, int]:
    """(first, last, of how many) of the parts that a split takes."""
    first, last, parts = found.groups()
    return int(first), int(last or first), int(parts)


def _fold(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`tensors`: convolution weight, norm weight, bias, running mean, running variance, then perhaps the convolution's bias."""
    names = ("weight", "bias", "running_mean", "running_var")
    return fold_norm(tensors[0], tensors[5] if len(tensors) > 5 else None, dict(zip(names, tensors[1:5])))


def why_not(transform: str, have: Sequence[Shape], want: Shape, *, picks: Sequence[Sequence[int]] | None = None) -> str | None:
    """Why the transform of tensors with shapes `have` cannot give `want`; None where it can. `picks`: the rows of `rows`."""
    if transform == "fuse":
        return _why_no_fuse(have, want)
    if transform.startswith("fold_norm"):
        return _why_no_fold(have, want, bias=transform.endswith("bias"))
    if transform == "add_position":
        fits_token = len(have) == 2 and len(have[1]) == 3 and num_elements(have[0]) == num_elements(want) == have[1][2]
        return None if fits_token else "takes a class token [1, 1, D] and its position embedding [1, N, D]"
    if len(have) != 1:
        return f"takes one source, not {len(have)}"
    if transform == "rows":
        return _why_no_rows(have[0], want, picks)
    if found := _SPLIT.match(transform):
        first, last, parts = _parts(found)
        whole = 0 <= first <= last < parts and have[0][:1] == (parts * (want[0] // (last + 1 - first)),) and want[0] % (last + 1 - first) == 0
        return None if whole and have[0][1:] == want[1:] else f"splits dimension 0 into {parts} equal parts"
    if found := _TO_GRID.match(transform):
        grid, (_, transform_to, shown) = (int(found.group(2)), int(found.group(3))), _GRIDS[found.group(1)]
        return None if transform_to(have[0], want, grid) is not None else f"resizes {shown} of square grids to {grid[0]} x {grid[1]} places"
    fits, rule = _RULES[transform]
    return None if fits(have[0], want) else rule


def _why_no_fuse(have: Sequence[Shape], want: Shape) -> str | None:
    alike = len({shape[1:] for shape in have}) == 1 and all(shape for shape in have)
    return None if alike and (sum(shape[0] for shape in have), *have[0][1:]) == want else "joins tensors along dimension 0"


def _why_no_fold(have: Sequence[Shape], want: Shape, *, bias: bool) -> str | None:
    if len(have) not in (5, 6):
        return "takes a weight, a norm's weight, bias, running_mean and running_var, and optionally the layer's bias"
    outputs = have[0][:1]
    if any(shape != outputs for shape in have[1:]) or want != (outputs if bias else have[0]):
        return "keeps the shape of the layer, and needs a norm with as many channels as the layer has outputs"
    return None


def _why_no_rows(have: Shape, want: Shape, picks: Sequence[Sequence[int]] | None) -> str | None:
    if picks is None:
        return "needs rows: for each class of the network, a row of the source or a list of rows to average"
    if len(picks) != want[0] or have[1:] != want[1:]:
        return f"was given {len(picks)} rows for a head of {want[0]} outputs" if have[1:] == want[1:] else "changes dimension 0 only"
    beyond = [row for pick in picks for row in pick if not 0 <= row < have[0]]
    return f"selects row {beyond[0]}, but the source has {have[0]} rows" if beyond else None


def _turned(have: Shape, want: Shape) -> bool:
    turned = (have[3], have[2], have[0], have[1]) if len(have) == 4 else have[::-1]
    return len(have) in (2, 4) and squeezed(turned) == squeezed(want) and turned[0] == want[0]


def _front(tokens: int) -> int:
    return next(extra for extra in (0, 1, 2) if round((tokens - extra) ** 0.5) ** 2 == tokens - extra)


def _positions(have: Shape, want: Shape) -> bool:
    return is_position_table(have, want) and (len(have) == 4 or _front(want[1]) <= _front(have[1]))


_RULES: dict[str, tuple[Callable[[Shape, Shape], bool], str]] = {
    "stem_channels": (lambda a, b: len(a) == len(b) == 4 and (a[0], *a[2:]) == (b[0], *b[2:]), "changes only the input channels of a convolution"),
    "squeeze": (lambda a, b: squeezed(a) == squeezed(b), "adds and removes dimensions of size 1 only"),
    "reshape_kernel": (
        lambda a, b: {len(a), len(b)} == {2, 4} and a[0] == b[0] and num_elements(a) == num_elements(b),
        "converts a linear layer to a convolution with the same number of inputs, or back",
    ),
    "resize_position_embedding": (
        _positions,
        "resizes [1, N, D], [1, D, H, W] or [1, H, W, D] position embeddings of square grids and keeps class tokens in front of the grid",
    ),
    "zero_position": (
        lambda a, b: len(a) == 3 and is_position_table(a, b) and _front(a[1]) == 0 < _front(b[1]),
        "puts rows of zeros for class tokens in front of [1, N, D] position embeddings of a square grid",
    ),
    "resize_relative_table": (is_relative_table, "resizes [(2s-1)^2, heads] tables"),
    "resize_relative_axis": (is_axis_table, "resizes [2s-1, D] tables of the distances along one axis"),
    "resize_patches": (lambda a, b: len(a) == len(b) == 4 and a[:2] == b[:2] and a[2] == a[3] and b[2] == b[3], "resizes square kernels"),
    "transpose_stem": (
        lambda a, b: len(a) == len(b) == 4 and (a[3], *a[:2]) == (b[0], *b[2:]),
        "permutes the first convolution's [kh, kw, I, O] to [O, I, kh, kw] and changes its input channels",
    ),
    "transpose_kernel": (_turned, "permutes [kh, kw, I, O] to [O, I, kh, kw], and [I, O] to [O, I]"),
}
