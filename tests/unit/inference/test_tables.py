"""Rates and confused pairs of an evaluation, from counts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dtl.inference.assess import Confusion
from dtl.inference.tables import class_rates, confused_pairs


def confusion_of(counts: npt.NDArray[np.int64]) -> Confusion:
    return Confusion.of(len(counts), np.arange(counts.size)[counts.ravel() > 0], counts.ravel()[counts.ravel() > 0])


def test_rates_and_pairs_of_hand_made_counts() -> None:
    counts = np.array([[5, 0, 3, 0], [3, 1, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    confusion = confusion_of(counts)
    rows = class_rates(confusion)
    assert rows[0] == {"precision": 5 / 12, "recall": 5 / 8, "f1": 10 / 20, "support": 8}
    assert rows[2] == {"precision": 0.0, "recall": None, "f1": 0.0, "support": 0}  # never there, named three times
    assert rows[3] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 4}  # there, never named
    pairs = [(pair["label"], pair["predicted"], pair["count"]) for pair in confused_pairs(confusion, "abcd")]
    assert pairs == [("d", "a", 4), ("a", "c", 3), ("b", "a", 3)]
