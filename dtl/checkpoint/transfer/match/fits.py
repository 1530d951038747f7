"""Whether one layer's weights can become another's, and through which named transform (`dtl.checkpoint.transfer.adapt`)."""

from __future__ import annotations

from math import isqrt

from dtl.checkpoint.transfer.layers.units import WEIGHTED, Shape, Unit, num_elements, squeezed

IMAGE_CHANNELS = 4
"""A first convolution is one of images if either side has at most this many input channels."""


def unit_transform(source: Unit, target: Unit, *, first: bool) -> str | None:
    """The transform that makes `source` fit `target`: "" for equal shapes, None where there is none.

    `first`: the target is the network's first convolution, whose input channels may differ. Every role that both have must
    agree; the transform is that of the main tensor.
    """
    transform = ""
    for role, (_, shape) in target.roles.items():
        if role not in source.roles:
            continue
        have = source.roles[role][1]
        if have == shape:
            continue
        how = tensor_transform(have, shape, kinds=(source.kind, target.kind), name=target.path, first=first and role == "weight")
        if how is None:
            return None
        transform = how
    return transform


def tensor_transform(have: Shape, want: Shape, *, kinds: tuple[str, str], name: str, first: bool) -> str | None:
    """The transform from shape `have` to shape `want`, by what kind of layer and what name it is; None where there is none."""
    weighted = kinds[0] in WEIGHTED and kinds[1] in WEIGHTED
    if weighted:
        return _weight_transform(have, want, first=first, patches="patch" in name or "proj" in name.split(".")[-1])
    if squeezed(have) == squeezed(want):
        return "squeeze"
    lowered = name.lower()
    if "pos" in lowered and "relative" not in lowered and is_position_table(have, want):
        return "resize_position_embedding"
    if "relative_position_bias_table" in lowered and is_relative_table(have, want):
        return "resize_relative_table"
    return None


def _weight_transform(have: Shape, want: Shape, *, first: bool, patches: bool) -> str | None:
    if squeezed(have) == squeezed(want) and have[0] == want[0]:
        return "squeeze"
    if {len(have), len(want)} == {2, 4} and have[0] == want[0] and num_elements(have) == num_elements(want):
        return "reshape_kernel"
    if len(have) == len(want) == 4 and have[0] == want[0] and first:
        if have[2:] == want[2:] and min(have[1], want[1]) <= IMAGE_CHANNELS:
            return "stem_channels"
        if patches and have[1] == want[1] and have[2] == have[3] and want[2] == want[3]:
            return "resize_patches"
    return None


def is_position_table(have: Shape, want: Shape) -> bool:
    """[1, N, D] both, or [1, D, H, W] both, of one width."""
    if len(have) == len(want) == 3:
        return have[0] == want[0] == 1 and have[2] == want[2] and _grid(have[1]) is not None and _grid(want[1]) is not None
    return len(have) == len(want) == 4 and have[:2] == want[:2] and have[0] == 1


def _grid(num_tokens: int) -> int | None:
    """The side of the square grid behind a row of tokens, with up to two tokens more (class, distillation)."""
    return next((isqrt(num_tokens - extra) for extra in (0, 1, 2) if isqrt(num_tokens - extra) ** 2 == num_tokens - extra), None)


def is_relative_table(have: Shape, want: Shape) -> bool:
    """[(2s-1)^2, heads], the same number of heads."""
    if not (len(have) == len(want) == 2 and have[1] == want[1]):
        return False
    return all(isqrt(rows) ** 2 == rows and isqrt(rows) % 2 == 1 for rows in (have[0], want[0]))
