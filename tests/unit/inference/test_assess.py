"""The calibration error from its bins."""

from __future__ import annotations

import math

import pytest

from dtl.inference.assess import NUM_BINS, Assessment


def seen(samples: dict[int, int], correct: dict[int, int], confidence: dict[int, float]) -> Assessment:
    def bins(values: dict[int, int]) -> list[int]:
        return [values.get(place, 0) for place in range(NUM_BINS)]

    sums = {place: round(value * 2**32) for place, value in confidence.items()}
    return Assessment({}, [], bins(samples), bins(correct), bins(sums), [], [])


def test_calibration_error_is_the_weighted_distance() -> None:
    # 4 images at 0.75 of which 3 are right; 6 at 0.95 of which 3 are right.
    one = seen({11: 4, 14: 6}, {11: 3, 14: 3}, {11: 3.0, 14: 5.7})
    assert one.calibration_error == pytest.approx(0.6 * (0.95 - 0.5))


def test_no_image_has_no_calibration_error() -> None:
    assert math.isnan(seen({}, {}, {}).calibration_error)
