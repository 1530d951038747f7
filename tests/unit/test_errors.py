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
