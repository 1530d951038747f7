"""Room in /dev/shm, through which loader processes hand their batches over. Too little of it ends a run with a bus error, hours in.

Containers are given 64 MiB unless told otherwise, so what a run will need is computed and compared before the first step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dtl.errors import UserError

SHM = Path("/dev/shm")
_PAGE = 4096
_TENSORS = 4  # beside the images: labels, weights, samples, slots


def batch_bytes(*, micro_batch_size: int, image_size: int) -> int:
    """Of one micro-batch, each of its tensors a file of whole pages."""
    return _pages(micro_batch_size * 3 * image_size**2) + _TENSORS * _pages(8 * micro_batch_size)


def bytes_needed(*, micro_batch_size: int, image_size: int, accumulation_steps: int, workers: int, prefetch: int) -> int:
    """The most that one rank's loader has in shared memory: what is asked of its workers, made or not, and two steps in the trainer's hands."""
    return (workers * prefetch + 2 * accumulation_steps) * batch_bytes(micro_batch_size=micro_batch_size, image_size=image_size) if workers else 0


def check_shared_memory(needed: int, *, ranks: int, workers: int, folder: Path = SHM) -> None:
    """UserError where `ranks` processes of this node that need `needed` bytes each do not find them. Elsewhere than on Linux nothing is checked."""
    if not needed or sys.platform != "linux" or not folder.is_dir():
        return
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if ranks * needed > free:
        raise UserError(
            f"{folder} has {_mib(free)} MiB free of {_mib(space.f_blocks * space.f_frsize)}, but the batches of {ranks} process(es) with {workers} loader "
            f"processes each take up to {_mib(ranks * needed)} MiB there: give it more (docker run --shm-size {-(-ranks * needed // 2**30)}g, or --ipc=host), "
            "or load with fewer (--data.workers N, 0: in the training process), or in smaller parts (--data.micro-batch-size N)"
        )


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
