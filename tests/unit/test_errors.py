"""Errors cross a process and keep what they say."""

from __future__ import annotations

import pickle

import pytest

from dtl.errors import DamagedSample, UserError


@pytest.mark.parametrize(("key", "named"), [("n01/a", "sample n01/a"), ("", "a sample")])
def test_a_damaged_sample_survives_another_process(key: str, named: str) -> None:
    error = DamagedSample(shard="s.tar", key=key, offset=512, reason="cut")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DamagedSample)
    assert isinstance(again, UserError)
    assert str(again) == str(error) == f"s.tar: {named} at byte 512 is damaged: cut"
    assert (again.shard, again.key, again.offset, again.reason) == ("s.tar", key, 512, "cut")


def test_names_in_a_message_cannot_begin_a_line_or_move_the_cursor() -> None:
    error = UserError("photos/x\n\x1b[2K\rdtl: all is well\n.png: cannot be read")
    assert str(error) == "photos/x\\n\\x1b[2K\\rdtl: all is well\\n.png: cannot be read"
    assert str(UserError("first", "a table\n")) == "first\na table\\n"


def test_a_line_that_repeats_what_a_file_holds_is_bounded() -> None:
    line = str(UserError("the key " + "[" * 1_000_000 + " is not known; what to do"))
    assert len(line) < 2100
    assert line.startswith("the key [[[")
    assert line.endswith("what to do")
