"""The built-in digits: 1,797 real handwritten digits, 8 x 8 gray, ten classes; nothing to download.

They are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0, in the form in which scikit-learn ships them. Changed here: stored
as uint8 in digits.npz, and scaled from 0 ... 16 to 0 ... 255 when read. Forms filled in by 13 of 43 people, 4 x 4 blocks counted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

DIGITS_VAL_FRACTION = 0.2


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Images [1797, 8, 8] from 0 to 255, and labels [1797]."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        counts, labels = file["images"], file["labels"]
    images = ((counts.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    return images, labels.astype(np.int32)
