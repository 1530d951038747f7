"""Any text, as YAML: plain values in bounded memory, or one clear line."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dtl.errors import UserError
from dtl.untrusted import parse_yaml

PIECES = ["- ", "? ", ": ", "a: ", "&a ", "*a", "&b ", "*b", "[", "]", "{", "}", ", ", "\n", "  ", "\t", "!!binary ", "!!set ", "!!python/object:os.system ",
          "!!timestamp ", "<<: ", "|\n", ">-\n", "---\n", "...\n", "%YAML 1.1\n", "'", '"', "#", "\\x00", "\0", ".inf", "-.nan", "1e999", "0x1f", "9" * 400,
          "2024-13-45", "2024-01-01", "null", "yes", "\ud7ff", "\u202e", "é"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=40).map("".join)
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=10,
)


def one_line(error: UserError) -> None:
    assert str(error).startswith("the text: ")
    assert "\n" not in str(error)


def check_plain(value: object, depth: int = 0) -> int:
    """The number of values; fails for one that is not plain, finite and flat enough."""
    assert depth <= 60
    if isinstance(value, float):
        assert math.isfinite(value)
    if isinstance(value, str):
        assert "\0" not in value
    inner = [*value, *value.values()] if isinstance(value, dict) else list(value) if isinstance(value, list | tuple | set) else []
    return 1 + sum(check_plain(one, depth + 1) for one in inner)


@given(texts)
def test_any_text_is_plain_values_or_a_clear_line(text: str) -> None:
    try:
        value = parse_yaml(text, "the text")
    except UserError as error:
        one_line(error)
        return
    assert check_plain(value) <= 200_000


@given(plain)
def test_what_was_dumped_comes_back(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "the text") == value


@given(st.integers(2, 9), st.sampled_from([2, 9, 40]), st.sampled_from(["[{}]", "{{{}}}"]))
def test_anchors_of_anchors_take_no_memory(levels: int, width: int, form: str) -> None:
    lines = ["l0: &l0 x"]
    for level in range(1, levels):
        uses = ", ".join(f"*l{level - 1}" if form[0] == "[" else f"k{use}: *l{level - 1}" for use in range(width))
        lines.append(f"l{level}: &l{level} {form.format(uses)}")
    tracemalloc.start()
    try:
        parse_yaml("\n".join(lines), "the text")
        grew = False
    except UserError as error:
        one_line(error)
        grew = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert grew or width**levels < 100_000 * width


@pytest.mark.parametrize("bracket", ["[", "{a: ", "- ", "? "])
@pytest.mark.parametrize("depth", [49, 51, 900, 50_000])
def test_depth_is_bounded(bracket: str, depth: int) -> None:
    closing = {"[": "]", "{a: ": "}"}.get(bracket, "")
    text = bracket * depth + "1" + closing * depth
    if depth > 51:
        with pytest.raises(UserError, match=r"nested deeper|not valid YAML") as caught:
            parse_yaml(text, "the text")
        one_line(caught.value)
    elif depth < 50 and bracket != "? ":  # a mapping as a key is none
        assert check_plain(parse_yaml(text, "the text")) > depth
