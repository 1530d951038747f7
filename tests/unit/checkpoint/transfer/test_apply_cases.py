"""Weights as people meet them (benchmarks/transfer_cases.py): what becomes of each today, and that nothing gets worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer_cases import CASES, Case, advice, outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_becomes_of_it(case: Case, tmp_path: Path) -> None:
    assert outcome(case, tmp_path) == case.today


def test_advice_is_read_as_it_is_written() -> None:
    assert advice("refused: coverage 42%. To load it anyway, set ignore: ['decoder.*', 'aux.*']") == {"ignore": ["decoder.*", "aux.*"]}
    assert advice("to decide it, write into a map: a.weight: {source: b.weight, transform: squeeze}") == {
        "mapping": {"a.weight": {"source": "b.weight", "transform": "squeeze"}}
    }
    assert advice("choose one: source: x/best.pth#model_ema or source: x/best.pth#model") == {"key": "model_ema"}
    assert advice("nothing matches") == {}
