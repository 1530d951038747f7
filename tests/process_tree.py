"""The processes of a run, looked at from outside."""

from __future__ import annotations

import os

import psutil


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


def private_memory_of_a_loader(shards: str) -> int:
    """Prints the MiB that a loader process alone holds, after its trainer has used its memory again: 256 MiB that were free when the process was forked."""
    import torch

    from dtl import build_loader
    from dtl.machine import keep_freed_memory

    keep_freed_memory()
    activations = [torch.ones(8, 2**20) for _ in range(8)]
    del activations
    batches = iter(build_loader(shards, image_size=8, batch_size=2, workers=1))
    next(batches)
    activations = [torch.ones(8, 2**20) for _ in range(8)]
    assert all(part.all() for part in activations)
    (child,) = children(os.getpid())
    print(psutil.Process(child).memory_full_info().uss >> 20)
    return 0
