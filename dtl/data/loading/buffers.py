"""Memory for batches that loader processes fill and the trainer reads: made once, before the processes fork, and used again.

A fresh 10 MB batch is 2,400 pages that the kernel has to find and zero, once in the loader process and once more in the shared memory
that torch copies it to: a quarter of a loader's CPU time for small photos. These buffers take both away, and need no room in /dev/shm.
A buffer is given back when the last tensor that looks at it is gone, views and NumPy arrays included: whoever keeps batches keeps them
whole, and the loader then falls back to fresh memory.
"""

from __future__ import annotations

import itertools
import mmap
import sys
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count()
_pools: dict[int, BatchBuffers] = {}


class BatchBuffers:
    """`num` buffers for uint8 images [B, 3, S, S], channels last. Make it before the processes that fill it are forked."""

    def __init__(self, num: int, *, micro_batch_size: int, image_size: int) -> None:
        assert sys.platform == "linux", "only forked processes share these"
        self._shape = (micro_batch_size, image_size, image_size, 3)
        self._maps = [mmap.mmap(-1, int(np.prod(self._shape))) for _ in range(num)]
        self._free = deque(range(num))
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self) -> int | None:
        """In the trainer: a buffer that nobody looks at, or None."""
        return self._free.popleft() if self._free else None

    def view(self, buffer: int) -> Tensor:
        """In a loader process: the buffer to fill."""
        return _images(np.frombuffer(self._maps[buffer], np.uint8), self._shape)

    def hand_out(self, buffer: int) -> Tensor:
        """In the trainer: the filled buffer; given back when the tensor's memory is let go."""
        memory = np.frombuffer(self._maps[buffer], np.uint8)
        # torch holds this very array until the last tensor over it is gone.
        weakref.finalize(memory, self._free.append, buffer).atexit = False
        return _images(memory, self._shape)

    def close(self) -> None:
        """No more batches will come; those that are out stay whole."""
        _pools.pop(self.number, None)


def pool(number: int) -> BatchBuffers:
    return _pools[number]


def _images(memory: np.ndarray, shape: tuple[int, int, int, int]) -> Tensor:
    return torch.from_numpy(memory).view(shape).permute(0, 3, 1, 2)
