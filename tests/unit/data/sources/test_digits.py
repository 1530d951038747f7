"""The digits of scikit-learn as a source."""

from __future__ import annotations

import hashlib

import numpy as np

from dtl.data.sources.digits import read_digits


def test_digits_are_those_of_scikit_learn() -> None:
    """The hashes were made from sklearn.datasets.load_digits() of scikit-learn 1.9.1, its 0 ... 16 as 0 ... 255, rounded."""
    images, labels = read_digits()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images[0].tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f"
    assert hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest() == "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
