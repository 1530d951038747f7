"""Whether a named transform (`dtl.checkpoint.transfer.adapt`) makes one shape of another: what a map asks for is checked before it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtl.checkpoint.transfer.layers.units import Shape, num_elements, squeezed
from dtl.checkpoint.transfer.match.fits import is_position_table, is_relative_table


def why_not(transform: str, have: Sequence[Shape], want: Shape, *, picks: Sequence[Sequence[int]] | None = None) -> str | None:
    """Why the transform of tensors with shapes `have` cannot give `want`; None where it can. `picks`: the rows of `rows`."""
    if transform == "fuse":
        return _why_no_fuse(have, want)
    if transform.startswith("fold_norm"):
        return _why_no_fold(have, want, bias=transform.endswith("bias"))
    if len(have) != 1:
        return f"takes one source, not {len(have)}"
    if transform == "rows":
        return _why_no_rows(have[0], want, picks)
    if transform.startswith("split_"):
        parts = int(transform.rpartition("_")[2])
        return None if have[0] == (parts * want[0], *want[1:]) else f"cuts dimension 0 into {parts} equal parts"
    fits, rule = _RULES[transform]
    return None if fits(have[0], want) else rule


def _why_no_fuse(have: Sequence[Shape], want: Shape) -> str | None:
    alike = len({shape[1:] for shape in have}) == 1 and all(shape for shape in have)
    return None if alike and (sum(shape[0] for shape in have), *have[0][1:]) == want else "joins tensors along dimension 0"


def _why_no_fold(have: Sequence[Shape], want: Shape, *, bias: bool) -> str | None:
    if len(have) not in (5, 6):
        return "takes a weight, a norm's weight, bias, running_mean and running_var, and perhaps the layer's bias"
    outputs = have[0][:1]
    if any(shape != outputs for shape in have[1:]) or want != (outputs if bias else have[0]):
        return "keeps the layer's shape, and its norm has as many channels as the layer has outputs"
    return None


def _why_no_rows(have: Shape, want: Shape, picks: Sequence[Sequence[int]] | None) -> str | None:
    if picks is None:
        return "needs rows: for each class here the row of the source, or a list of rows to average"
    if len(picks) != want[0] or have[1:] != want[1:]:
        return f"was given {len(picks)} rows for a head of {want[0]} outputs" if have[1:] == want[1:] else "keeps all but dimension 0"
    beyond = [row for pick in picks for row in pick if not 0 <= row < have[0]]
    return f"asks for row {beyond[0]} of {have[0]}" if beyond else None


def _turned(have: Shape, want: Shape) -> bool:
    turned = (have[3], have[2], have[0], have[1]) if len(have) == 4 else have[::-1]
    return len(have) in (2, 4) and squeezed(turned) == squeezed(want) and turned[0] == want[0]


def _front(tokens: int) -> int:
    return next(extra for extra in (0, 1, 2) if round((tokens - extra) ** 0.5) ** 2 == tokens - extra)


def _positions(have: Shape, want: Shape) -> bool:
    return is_position_table(have, want) and (len(have) == 4 or _front(want[1]) <= _front(have[1]))


_RULES: dict[str, tuple[Callable[[Shape, Shape], bool], str]] = {
    "stem_channels": (lambda a, b: len(a) == len(b) == 4 and (a[0], *a[2:]) == (b[0], *b[2:]), "changes the input channels of a convolution, nothing else"),
    "squeeze": (lambda a, b: squeezed(a) == squeezed(b), "adds and removes dimensions of size 1 only"),
    "reshape_kernel": (
        lambda a, b: {len(a), len(b)} == {2, 4} and a[0] == b[0] and num_elements(a) == num_elements(b),
        "turns a linear layer into a convolution of as many inputs, or back",
    ),
    "resize_position_embedding": (_positions, "resizes [1, N, D] or [1, D, H, W] tables of square grids, tokens in front kept"),
    "resize_relative_table": (is_relative_table, "resizes [(2s-1)^2, heads] tables"),
    "resize_patches": (lambda a, b: len(a) == len(b) == 4 and a[:2] == b[:2] and a[2] == a[3] and b[2] == b[3], "resizes square kernels"),
    "transpose_kernel": (_turned, "turns [kh, kw, I, O] into [O, I, kh, kw] and [I, O] into [O, I]"),
}
