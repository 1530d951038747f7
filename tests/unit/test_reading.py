"""What a run decides about stored values, as JSON and back; what is damaged, or of an older dtl."""

from __future__ import annotations

from typing import Any

import pytest

from dtl.reading import AS_BEFORE, Reading


@pytest.mark.parametrize("reading", [AS_BEFORE, Reading((0.0, 4095.0), exif=True, alpha=True), Reading((-0.5, 1e9))])
def test_it_comes_back_from_json(reading: Reading) -> None:
    assert Reading.from_values(reading.to_json()) == reading


def test_a_model_of_an_older_dtl_reads_as_it_was_trained() -> None:
    assert Reading.from_values(None) == AS_BEFORE


@pytest.mark.parametrize(
    "values",
    [[], 3, {}, {"range": [2, 1], "exif": 1, "alpha": 1}, {"range": [1], "exif": 1, "alpha": 1}, {"range": ["x", 2], "exif": 1, "alpha": 1}, {"range": None}],
)
def test_what_is_damaged_is_refused(values: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Reading.from_values(values)
