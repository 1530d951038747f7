"""Speeds are measured on the user's own images."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_decoding_is_measured_on_ones_own_images(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.jpg")
    from dtl.doctor.measure import decode

    facts = decode({"image_size": 32, "data": str(tmp_path), "seconds": 0.05})
    assert facts["what"].startswith("6 images of")
    assert 0 < facts["ms_per_image"] < 1000
    with pytest.raises(ValueError, match="has no images that could be read"):
        decode({"image_size": 32, "data": str(tmp_path / "nothing"), "seconds": 0.05})
