"""Tables of strings: exact on the way to a file and back, and refused where the file is not whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dtl.data.shards.strings import StringTable
from dtl.errors import UserError

NAMES = ["a", "", "ä/ö.jpg", os.fsdecode(b"not-utf8-\xff"), "line\nbreak"]


def test_strings_come_back_from_a_file(tmp_path: Path) -> None:
    StringTable.build(NAMES).write(tmp_path / "names")
    table = StringTable.read(tmp_path / "names")
    assert [table[number] for number in range(len(table))] == NAMES


@pytest.mark.parametrize("names", [[], [""], ["", "", ""]])
def test_nothing_but_emptiness(names: list[str], tmp_path: Path) -> None:
    StringTable.build(names).write(tmp_path / "names")
    table = StringTable.read(tmp_path / "names")
    assert [table[number] for number in range(len(table))] == names


def test_join_and_take() -> None:
    joined = StringTable.join([StringTable.build(NAMES[:2]), StringTable.build([]), StringTable.build(NAMES[2:])])
    assert [joined[number] for number in range(len(joined))] == NAMES
    taken = joined.take(np.array([4, 0, 4, 1]))
    assert [taken[number] for number in range(len(taken))] == [NAMES[4], NAMES[0], NAMES[4], NAMES[1]]
    assert len(StringTable.join([])) == 0


def test_a_file_that_is_not_whole_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    place = tmp_path / "names"
    StringTable.build(NAMES).write(place)
    whole = place.read_bytes()
    for size in range(len(whole)):
        place.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is not a table of names|is truncated|bytes where"):
            StringTable.read(place)
    place.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=f"has {len(whole) + 1} bytes where {len(whole)} are expected"):
        StringTable.read(place)


def test_offsets_that_do_not_grow_are_refused_before_anything_is_taken(tmp_path: Path) -> None:
    place = tmp_path / "names"
    StringTable.build(["aa", "bb", "cc"]).write(place)
    data = bytearray(place.read_bytes())
    data[24:32] = (1 << 40).to_bytes(8, "little")
    place.write_bytes(data)
    table = StringTable.read(place)
    assert [table[number] for number in range(3)] == ["aabbcc", "", "cc"]
    with pytest.raises(UserError, match="its offsets do not increase"):
        table.take(np.array([0, 1]))
