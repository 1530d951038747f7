"""A batch of images: what the trainer asks a loader process for, what it gets, and the memory that the images lie in.

Loader processes write into buffers that are made once, before the processes fork, and used again. A fresh batch of 10 MB is 2,400 pages
that the kernel has to find and zero, once in the loader process and once more in the shared memory that torch copies it to: a quarter of
a loader's CPU time for small photos. Buffers save both, and need no space in /dev/shm. A buffer is free again when the last tensor over it
is gone, views and NumPy arrays included. Batches may be kept: the loader then uses new memory.
"""

from __future__ import annotations

import itertools
import mmap
import sys
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dtl.config.models import ImageSize, sides
from dtl.data.decoding.decode import Region, is_plain_jpeg
from dtl.data.decoding.headers import MAX_PIXELS, without_exif
from dtl.data.sampling.plan import MicroBatch
from dtl.errors import DamagedSample
from dtl.reading import Reading

_SMALL = ("labels", "weights", "samples", "slots")


class Transform(Protocol):
    """From a decoded image to the pixels that the network sees; `dtl.data.transforms.transforms.Transform` is the one in use.

    All randomness is in `draw`, for a whole batch and before anything is decoded. `apply` is then a pure function of one image and its
    draws, so a sample's pixels are the same in any batch, on any rank, in any loader process and after any restart.
    """

    @property
    def reading(self) -> Reading:
        """How stored values become pixels."""
        ...

    @property
    def is_fixed(self) -> bool:
        """A sample has the same pixels in each epoch: nothing is random."""
        ...

    @property
    def function(self) -> str | None:
        """A function of the user's own, package.module:function, that is called on each decoded image first."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that the pixels depend on, as JSON: part of the keys of caches."""
        ...

    def draw(self, samples: np.ndarray, widths: np.ndarray, heights: np.ndarray, *, seed: int, epoch: int) -> Any:
        """The draws of B samples: a pure function of (seed, epoch, sample id) and of the indexed sizes in pixels; all arrays int64 [B]."""
        ...

    def region(self, draws: Any, i: int) -> Region:
        """The rectangle of sample `i` that `apply_crop` needs, and the fraction of its size that it may be decoded at."""
        ...

    def apply(self, image: np.ndarray, draws: Any, i: int, out: Tensor) -> None:
        """Write sample `i`, decoded as uint8 [H, W, 3], into `out`, uint8 [3, S, S]. ValueError if the image has not the indexed size."""
        ...

    def apply_crop(self, crop: np.ndarray, draws: Any, i: int, out: Tensor) -> None:
        """The same from the pixels of `region` alone."""
        ...


@dataclass(frozen=True)
class Request(MicroBatch):
    """What a loader process is asked for: a micro-batch, and the buffer to put its images into, if there is one."""

    buffer: int | None = None


@dataclass
class Encoded:
    """The JPEGs of a micro-batch that a device will decode (`dtl.data.loading.device`), and their draws. n real samples."""

    draws: Any
    heights: np.ndarray
    """[n], and `widths` [n]: the indexed sizes in pixels."""
    widths: np.ndarray
    decoded: list[int] = field(default_factory=list)
    """Rows that are decoded already; the batch's images hold these alone, in this order."""
    rows: list[int] = field(default_factory=list)
    """Rows of the JPEGs in `data`, which lie one after another, of `sizes` bytes."""
    sizes: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    """Their EXIF orientations."""
    data: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def take(self, row: int, data: bytes, jpegs: list[bytes], max_pixels: int = MAX_PIXELS, *, turn: int = 1) -> bool:
        """True if the device decodes this image; its bytes are then appended to `jpegs`."""
        if not is_plain_jpeg(data, max_pixels):
            return False
        data = without_exif(data)
        self.rows.append(row)
        self.sizes.append(len(data))
        self.turns.append(turn)
        jpegs.append(data)
        return True

    def close(self, jpegs: list[bytes]) -> None:
        self.data = torch.from_numpy(np.frombuffer(bytearray(b"".join(jpegs)), np.uint8)) if jpegs else self.data


@dataclass
class Batch:
    """One micro-batch of one rank: B slots, first the real samples, then pads.

    The trainer computes sum(weights * loss), so pads and damaged samples do not count.
    """

    images: Tensor
    """uint8 [B, C, H, W], C mostly 3, channels last in memory; of a dataset with V `views` [V * B, C, H, W], all of the first view first."""
    labels: Tensor
    """int64 [B]"""
    weights: Tensor
    """float32 [B]: 1 for a real sample, 0 for a pad or a damaged sample."""
    samples: Tensor
    """int64 [B] sample ids"""
    slots: Tensor
    """int64 [B] places in the global batch, -1 for a pad; on the host"""
    epoch: int
    step: int
    """Step within the epoch, from 0."""
    bad: list[tuple[int, DamagedSample]] = field(default_factory=list)
    """Damaged samples: (sample id, what is wrong with it)."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """Wall and CPU seconds that the loader process spent on it."""
    place: tuple[int, int] | None = None
    """Only between processes: the pool and the buffer that hold the images."""
    encoded: Encoded | None = None
    """Only with `data.decode: device`, until the device has decoded: the images that `images` lacks."""
    failed: str = ""
    """Only between processes: what failed in the user's own function. The rest of the batch means nothing then."""
    num_real: int = -1
    """Slots that are not padding; -1: count them."""

    def __post_init__(self) -> None:
        if self.num_real < 0:
            self.num_real = int(np.count_nonzero(self.slots.numpy() >= 0))

    @property
    def full(self) -> bool:
        """True if every slot has weight 1: no pad, and no damaged sample."""
        return self.num_real == len(self.weights) and not self.bad

    def pin_memory(self) -> Batch:
        for name in ("images", *_SMALL):
            setattr(self, name, getattr(self, name).pin_memory())
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Arrays are pickled into the message itself; each tensor would take a file of shared memory.
        state = self.__dict__ | {name: getattr(self, name).numpy() for name in _SMALL}
        return state if self.place is None else state | {"images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _SMALL:
            setattr(self, name, torch.from_numpy(state[name]))
        if self.place is not None:
            number, buffer = self.place
            self.images, self.place = pool(number).images(buffer), None


_numbers = itertools.count()
_pools: dict[int, BatchBuffers] = {}


class BatchBuffers:
    """`num` buffers for uint8 images [B, 3, H, W], channels last. Make it before the processes that fill it are forked."""

    def __init__(self, num: int, *, micro_batch_size: int, image_size: ImageSize, channels: int = 3) -> None:
        assert sys.platform == "linux", "only forked processes share these"
        self._shape = (micro_batch_size, *sides(image_size), channels)
        self._maps = [mmap.mmap(-1, int(np.prod(self._shape))) for _ in range(num)]
        self._free = deque(range(num))
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self) -> int | None:
        """In the trainer: a free buffer, or None."""
        return self._free.popleft() if self._free else None

    def view(self, buffer: int) -> Tensor:
        """In a loader process: the buffer to fill."""
        return _images(np.frombuffer(self._maps[buffer], np.uint8), self._shape)

    def images(self, buffer: int) -> Tensor:
        """In the trainer: the images of a filled buffer, which is free again when their memory is released."""
        memory = np.frombuffer(self._maps[buffer], np.uint8)
        # torch holds this very array until the last tensor over it is gone.
        weakref.finalize(memory, self._free.append, buffer).atexit = False
        return _images(memory, self._shape)

    def close(self) -> None:
        """No more batches will come. Those in use stay valid."""
        _pools.pop(self.number, None)


def pool(number: int) -> BatchBuffers:
    return _pools[number]


def _images(memory: np.ndarray, shape: tuple[int, int, int, int]) -> Tensor:
    return torch.from_numpy(memory).view(shape).permute(0, 3, 1, 2)
