"""Networks by the name of `obstacles:FUNCTION` that bring trouble with them, of a kind that the environment names."""

from __future__ import annotations

import os
import time
from pathlib import Path

import networks
from torch import nn


def small(num_classes: int) -> nn.Module:
    """`networks:small`; on the rank in $SLEEP_ON, reading sleeps while there is a file named `sleep`; the disk takes $SLOW_DISK s a file."""
    if os.environ.get("SLEEP_ON") == os.environ.get("RANK", "0"):
        _sleep_when_told()
    if "SLOW_DISK" in os.environ:
        _slow_disk(float(os.environ["SLOW_DISK"]))
    return networks.small(num_classes)


def unrepeatable(num_classes: int) -> nn.Module:
    """Its initial values are others in each process, and nothing restores what hangs on them but is no parameter."""
    network = networks.small(num_classes)
    scale = 1.0 + int.from_bytes(os.urandom(2), "little") / 65536
    network[0].register_forward_hook(lambda module, inputs, output: output * scale)
    return network


def _sleep_when_told() -> None:
    from dtl.data.loader import BatchDataset

    read = BatchDataset.__getitems__

    def slow(self: BatchDataset, request):  # type: ignore[no-untyped-def]
        while Path("sleep").exists():
            time.sleep(0.1)
        return read(self, request)

    BatchDataset.__getitems__ = slow  # type: ignore[method-assign]


def _slow_disk(seconds: float) -> None:
    from dtl.checkpoint import durable

    write = durable._write

    def slow(path, pieces):  # type: ignore[no-untyped-def]
        time.sleep(seconds)
        return write(path, pieces)

    durable._write = slow
