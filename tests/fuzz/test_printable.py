"""Names of any characters: one line on the terminal, and one cell of a CSV file that no spreadsheet computes."""

from __future__ import annotations

import csv
import io
import json
import pickle
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from dtl.errors import DamagedSample, UserError, printable
from dtl.text import Column, csv_line, from_csv_cell, json_line, table

ANY = st.text(st.one_of(st.characters(codec=None), st.sampled_from("\n\r\t\x1b\x7f\x85\x9b\u202e\u2028\u2066\udc80=+-@'\";,")))
"""Also lone surrogates, as file names that are not UTF-8 have."""
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_plain(text: str) -> bool:
    bad = ("Cc", "Cs", "Zl", "Zp")
    return not any(unicodedata.category(letter) in bad or unicodedata.bidirectional(letter) in TURNING for letter in text)


@given(ANY)
def test_any_text_becomes_a_piece_of_one_line(text: str) -> None:
    shown = printable(text)
    assert is_plain(shown)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    assert shown == text or not is_plain(text) or max(text) >= "\u2060"


@given(ANY, ANY)
def test_errors_are_one_line_here_and_in_another_process(name: str, reason: str) -> None:
    for error in (UserError(f"{name}: {reason}"), DamagedSample(shard=name, key=reason, offset=1, reason=reason)):
        assert is_plain(str(error))
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@given(st.lists(st.tuples(ANY, ANY), max_size=4))
def test_a_table_has_a_line_a_row(rows: list[tuple[str, str]]) -> None:
    lines = table([Column("name"), Column("why")], rows).split("\n")
    assert len(lines) == 1 + len(rows)
    assert all(map(is_plain, lines))


@given(st.lists(ANY, min_size=2, max_size=4))
def test_a_csv_cell_is_no_formula_and_can_be_read_back(cells: list[str]) -> None:
    read = next(csv.reader(io.StringIO(csv_line(cells), newline="")))
    assert not any(cell[:1] in tuple("=+-@\t\r\n") for cell in read)
    assert [from_csv_cell(cell) for cell in read] == cells


@given(st.one_of(st.integers(), st.floats(allow_nan=False)))
def test_a_number_stays_a_number(number: float) -> None:
    assert type(number)(csv_line([number, None]).removesuffix(",\n")) == number


@given(st.dictionaries(ANY, ANY, max_size=3))
def test_json_for_a_terminal_is_still_json(values: dict[str, str]) -> None:
    line = json_line(values)
    assert json.loads(line) == values
    assert not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(letter) in TURNING for letter in line)
