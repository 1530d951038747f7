"""Which transform makes one shape fit another, and the line that settles a doubt."""

from __future__ import annotations

import pytest

from dtl.checkpoint.transfer.layers.layer import is_position_table, is_relative_table
from dtl.checkpoint.transfer.match.evidence import Flag


@pytest.mark.parametrize(
    ("have", "want", "it_is"),
    [
        ((1, 197, 768), (1, 577, 768), True),  # a class token and 14 x 14, then 24 x 24
        ((1, 196, 768), (1, 198, 768), True),  # without, and with class and distillation tokens
        ((1, 197, 768), (1, 577, 384), False),
        ((2, 197, 768), (2, 577, 768), False),
        ((1, 199, 768), (1, 577, 768), False),
        ((1, 64, 14, 14), (1, 64, 7, 9), True),
        ((1, 64, 14, 14), (1, 32, 14, 14), False),
        ((197, 768), (577, 768), False),
    ],
)
def test_position_tables(have: tuple[int, ...], want: tuple[int, ...], it_is: bool) -> None:
    assert is_position_table(have, want) == it_is


@pytest.mark.parametrize(
    ("have", "want", "it_is"), [((169, 4), (529, 4), True), ((169, 4), (529, 8), False), ((144, 4), (529, 4), False), ((170, 4), (529, 4), False)]
)
def test_relative_tables(have: tuple[int, ...], want: tuple[int, ...], it_is: bool) -> None:
    assert is_relative_table(have, want) == it_is


@pytest.mark.parametrize(
    ("alternative", "line"),
    [
        ((("a.w",), ""), "t: a.w"),
        ((("a.w",), "squeeze"), "t: {source: a.w, transform: squeeze}"),
        ((("q", "k"), "fuse"), "t: [q, k]"),
        ((("q", "k"), "split_0_of_2"), "t: {source: [q, k], transform: split_0_of_2}"),
    ],
)
def test_the_line_of_a_map_that_takes_the_first_alternative(alternative: tuple[tuple[str, ...], str], line: str) -> None:
    assert Flag("why", (alternative, (("other",), ""))).line("t") == line
