"""Space in /dev/shm, which loader processes need for their queues, and for batches that do not lie in our own buffers.

Too little of it ends a run with a bus error, or with a traceback from a semaphore. Containers get 64 MiB by default, and files of killed
programs stay there. So the need of a run is computed and compared before the first step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dtl.config.models import ImageSize, num_pixels
from dtl.errors import UserError
from dtl.text import counted

SHM = Path("/dev/shm")
_PAGE = 4096
_TENSORS = 4  # beside the images: labels, weights, samples, slots
_SEMAPHORES = 6  # of a queue and of the event that ends its process


def batch_bytes(*, micro_batch_size: int, image_bytes: int) -> int:
    """Bytes of one micro-batch: each of its tensors is a file of whole pages."""
    return _pages(micro_batch_size * image_bytes) + _TENSORS * _pages(8 * micro_batch_size)


def bytes_needed(
    *,
    micro_batch_size: int,
    image_size: ImageSize,
    accumulation_steps: int,
    workers: int,
    prefetch: int,
    own_buffers: bool,
    file_bytes: int = 0,
    channels: int = 3,
) -> int:
    """The most that one rank's loader takes in /dev/shm: a page for each semaphore of its queues, one queue for each process and one for all.

    Without `own_buffers` (`BatchBuffers`, on Linux) also batches: all that are requested from its processes, and two steps of the trainer.
    An image takes the bytes of its pixels, or `file_bytes` where JPEGs are sent to the device and these are larger.
    """
    if not workers:
        return 0
    batches = 0 if own_buffers else workers * prefetch + 2 * accumulation_steps
    return (workers + 1) * _SEMAPHORES * _PAGE + batches * batch_bytes(
        micro_batch_size=micro_batch_size, image_bytes=max(channels * num_pixels(image_size), file_bytes)
    )


def fits(needed: int, *, ranks: int, folder: Path = SHM) -> bool:
    """Whether `ranks` processes of this node, which need `needed` bytes each, find as much. Off Linux that is not known."""
    if not needed or sys.platform != "linux" or not folder.is_dir():
        return True
    if not os.access(folder, os.W_OK):
        return False
    space = os.statvfs(folder)
    return ranks * needed <= space.f_bavail * space.f_frsize


def check_shared_memory(needed: int, *, ranks: int, workers: int, folder: Path = SHM) -> None:
    """UserError if `ranks` processes of this node need more than is free, `needed` bytes each. Checked on Linux only."""
    if not fits(needed, ranks=ranks, folder=folder):
        if not os.access(folder, os.W_OK):
            raise UserError(
                f"{folder} cannot be written, but loader processes need it for their queues: mount it so that it can be, "
                "or load in the training process (--data.workers 0)"
            )
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        raise UserError(
            f"{folder} has {_shown(free)} free of {_shown(space.f_blocks * space.f_frsize)}, but {counted(ranks, 'process')} "
            f"with {counted(workers, 'loader process')} each need up to {_shown(ranks * needed)} there: delete files that other programs have left in it, "
            f"make it larger (docker run --shm-size {-(-ranks * needed // 2**30)}g, or --ipc=host), or use fewer loader processes "
            "(--data.workers N; 0 loads in the training process)"
        )


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
