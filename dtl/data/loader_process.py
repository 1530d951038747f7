"""Loader processes: how they start, what they answer to, and how they end; the same for all that is read in processes of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

PREFETCH = 2
"""Batches that each process makes ahead."""


def process_options(workers: int) -> dict[str, Any]:
    """What a DataLoader with `workers` processes is given; 0: it loads in the process itself.

    Whoever iterates it calls `end_processes` when done, also after an error.
    """
    # The base seed is unused, and must not be drawn from the training's generator.
    options: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator()}
    if workers:
        options["worker_init_fn"] = partial(_init_worker, os.getpid())
        options["prefetch_factor"] = PREFETCH
        # Python 3.14's own choice, a fork server, imports torch anew in each (5 s), and keeps them alive after a killed trainer.
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    return options


def end_processes(batches: Iterator[Any]) -> None:
    """End those behind a DataLoader's iterator, if it has any.

    torch does it when the iterator is freed, but an error on its way up keeps it until the interpreter's exit, which sends SIGTERM and
    would wait for ever: they ignore it.
    """
    processes = getattr(batches, "_workers", ())
    if processes:
        batches._shutdown_workers()  # type: ignore[attr-defined]
    for process in processes:
        if process.is_alive():  # 5 s later: it waits for a disk or a server
            process.kill()


def _init_worker(parent: int, worker: int) -> None:
    """Signals to the job are the trainer's to answer: a loader process that dies of one would break the step that is to be saved."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_with(parent: int) -> None:
    """torch's loader processes look for their parent while they wait for work, not while nobody takes what they have."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
