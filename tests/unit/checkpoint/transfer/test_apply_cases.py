"""Weights as people meet them (benchmarks/transfer_cases.py): what becomes of each today, and that nothing gets worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer_cases import CASES, Case, advice, outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_becomes_of_it(case: Case, tmp_path: Path) -> None:
    assert outcome(case, tmp_path) == case.today


def test_what_should_simply_load_does_so_by_default_or_after_the_first_message() -> None:
    """`today` is what the test above found. 95 % by default, and all after following what the first message says, once."""
    simple = [case.today for case in CASES if case.wanted == "right"]
    assert simple.count("right") >= 0.95 * len(simple)
    assert all(case.today in ("right", "followed") for case in CASES if case.wanted in ("right", "followed"))
    assert not [case.name for case in CASES if case.today in ("silent", "false", "crash")]


def test_advice_is_read_as_it_is_written() -> None:
    assert advice("refused: coverage 42%. To load it anyway, set ignore: ['decoder.*', 'aux.*']") == {"ignore": ["decoder.*", "aux.*"]}
    assert advice("to decide it, write into a map: a.weight: {source: b.weight, transform: squeeze}") == {
        "mapping": {"a.weight": {"source": "b.weight", "transform": "squeeze"}}
    }
    assert advice("choose one: source: x/best.pth#model_ema or source: x/best.pth#model") == {"key": "model_ema"}
    assert advice("nothing matches") == {}
