from typing import Any

import numpy as np
import numpy.typing as npt

LIBJPEG_TURBO: int

def crop(
    data: Any,
    image_height: int,
    image_width: int,
    reduction: int,
    top: int,
    left: int,
    height: int,
    width: int,
    out: npt.NDArray[np.uint8],
    /,
) -> bool: ...
