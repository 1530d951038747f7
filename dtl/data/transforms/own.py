"""A function of the user's own that changes training images before the preset (`data.augment.function`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dtl.config.functions import import_function, raised
from dtl.data.transforms.geometry import Pixels
from dtl.errors import UserError


class OwnFunction:
    """`package.module:function`, called with uint8 [3,H,W]; it gives uint8 [3,H',W'], of any size.

    It may draw from the global generators of torch, NumPy and Python: they are seeded for the call and restored afterwards, so an image of one epoch is the
    same on any rank, in any loader process and after any restart. Picklable: each process imports the function when it first needs it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_function": None}

    @property
    def function(self) -> Callable[..., Any]:
        """UserError where there is none."""
        if self._function is None:
            self._function = import_function(self.name, f"data.augment.function {self.name}")
        return self._function

    def __call__(self, image: Pixels, key: int, sample: str) -> Pixels:
        """`image` uint8 [H,W,3], which stays as it is, as the function changes it under the random numbers of `key`. UserError where it fails."""
        given = torch.from_numpy(image.copy()).permute(2, 0, 1)
        function = self.function
        with _seeded(key):
            try:
                found = function(given)
            except Exception as error:
                raise UserError(f"data.augment.function {self.name} failed on {sample}: {raised(error)}") from error
        if not isinstance(found, torch.Tensor) or found.dtype != torch.uint8 or found.ndim != 3 or len(found) != image.shape[2] or not found.numel():
            raise UserError(
                f"data.augment.function {self.name} gave {_described(found)} for {sample}; it takes and gives a tensor uint8 [{image.shape[2]}, H, W]"
            )
        # As a plain tensor: torchvision's v2 has kinds of its own.
        return np.ascontiguousarray(found.detach().as_subclass(torch.Tensor).permute(1, 2, 0).numpy())


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """The global generators of the CPU, seeded; as they were, afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(key >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _described(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    return f"a {type(found).__name__}"
