"""The parts of an audit; tests/unit/commands/test_audit.py runs it whole."""

from __future__ import annotations

import numpy as np

from dtl.data.near import near_pairs
from dtl.inference.audit import _joined, _Rows, _Stacked


def test_images_that_pairs_connect_are_one_group() -> None:
    assert _joined(7, [(1, 2), (5, 6), (2, 5)]).tolist() == [0, 1, 1, 3, 4, 1, 1]
    assert _joined(3, []).tolist() == [0, 1, 2]


def test_features_of_several_splits_are_one_array() -> None:
    draw = np.random.default_rng(0)
    parts = [draw.random((3, 4)).astype(np.float32), draw.random((5, 2, 2)).astype(np.float32)]
    stacked = _Stacked(parts, np.array([0, 3, 8]))
    whole = np.concatenate([part.reshape(len(part), -1) for part in parts])
    assert stacked.shape == whole.shape
    assert np.array_equal(stacked[1:6], whole[1:6])
    assert np.array_equal(stacked[np.array([7, 0, 4])], whole[[7, 0, 4]])
    some = _Rows(stacked, np.array([0, 2, 5, 7]))
    assert np.array_equal(some[1:], whole[[2, 5, 7]])
    found, expected = near_pairs(some, 0.5), near_pairs(whole[[0, 2, 5, 7]], 0.5)
    assert np.array_equal(found.cosine, expected.cosine)
