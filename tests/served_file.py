"""The file that the server of tests/unit/data/remote serves as a.tar."""

from __future__ import annotations

import numpy as np

DATA = np.random.default_rng(0).bytes(300_000)
