"""PNG without compression."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_images import pixels

from dtl.data.decoding.png import store_png


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (32, 32, 3), (200, 150, 3), (1, 65_600)])
def test_stored_png_is_lossless(shape: tuple[int, ...]) -> None:
    from dtl.data.decoding.decode import decode

    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    if max(shape) > 65_535:
        import io

        from PIL import Image

        with Image.open(io.BytesIO(store_png(image))) as opened:
            np.testing.assert_array_equal(np.asarray(opened), image)
    else:
        np.testing.assert_array_equal(decode(store_png(image)), rgb)
    assert store_png(pixels(2, 2)).startswith(b"\x89PNG")
