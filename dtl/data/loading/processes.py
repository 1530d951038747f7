"""Loader processes: how they start, which signals they ignore, and how they end; for every DataLoader of dtl."""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from dtl.machine import end_with_parent, give_back_freed_memory

PREFETCH = 2
"""Batches that each process prefetches."""
START_SECONDS = 20.0
"""Processes that have not started after this long are replaced."""
T = TypeVar("T")


def start_processes(make: Callable[[dict[str, Any]], Iterator[T]], workers: int) -> Iterator[T]:
    """`make(options)`, the iterator of a DataLoader with these options, once all of its processes have started.

    Before Python 3.12 (python/cpython#112275) a forked process may wait forever for a lock of the interpreter that another thread held at that
    moment, such as a thread of gloo that frees a tensor; seen with 3.11.7. If a process has not started in time, all are ended, and `make` is
    called once more.
    """
    if sys.platform == "linux" and workers:
        for attempt in (1, 2):
            pipe = os.pipe()
            batches: Iterator[T] = iter(())
            all_started = False
            try:
                batches = _made(make, process_options(workers, pipe))
                all_started = _all_started(batches, workers, pipe[0], attempt * START_SECONDS)
            finally:
                for end in pipe:
                    os.close(end)
                if not all_started:  # or Ctrl-C came meanwhile
                    end_processes(batches)
            if all_started:
                return batches
    return _made(make, process_options(workers))


def _made(make: Callable[[dict[str, Any]], Iterator[T]], options: dict[str, Any]) -> Iterator[T]:
    """`make(options)`. A forked process inherits garbage, among it perhaps CUDA tensors: to free one calls CUDA, which ends a forked process
    (pytorch#50200). So it inherits a garbage collector that is off, and `_init_worker` excludes from collection what was there before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return make(options)
    finally:
        if collects:
            gc.enable()


def _all_started(batches: Any, workers: int, reading: int, seconds: float) -> bool:
    until, started = time.monotonic() + seconds, 0
    while started < workers and time.monotonic() < until:
        if select.select([reading], [], [], 0.2)[0]:
            started += len(os.read(reading, workers))
        elif not all(process.is_alive() for process in batches._workers):
            return True  # the DataLoader raises what ended it
    return started == workers


def process_options(workers: int, pipe: tuple[int, int] | None = None) -> dict[str, Any]:
    """Arguments of a DataLoader with `workers` processes; 0: it loads in this process.

    Each process writes a byte to `pipe` (reading end, writing end) when it starts. Call `end_processes` when done, also after an error.
    """
    # The base seed is unused, and must not be drawn from the training's generator.
    options: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator()}
    if workers:
        options["worker_init_fn"] = partial(_init_worker, os.getpid(), pipe)
        options["prefetch_factor"] = PREFETCH
        # Python 3.14's own choice, a fork server, imports torch again in each (5 s), and keeps them alive after a killed trainer.
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    return options


def end_processes(batches: Iterator[Any]) -> None:
    """End the processes of a DataLoader's iterator, if it has any.

    torch does so when the iterator is freed, but a raised error keeps it until the interpreter exits. That sends SIGTERM, which the processes
    ignore, and would wait forever.
    """
    processes = getattr(batches, "_workers", ())
    if processes:
        batches._shutdown_workers()  # type: ignore[attr-defined]
    for process in processes:
        if process.is_alive():  # 5 s later: it waits for a disk or a server
            process.kill()
            process.join(1.0)


def _init_worker(parent: int, pipe: tuple[int, int] | None, worker: int) -> None:
    """Signals to the job are for the trainer: a loader process that ends at one would break the step that is to be saved."""
    gc.freeze()
    gc.enable()
    # torch's loader processes check for their parent while they wait for work, but not while their finished batches are not taken.
    end_with_parent(parent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    give_back_freed_memory()  # before the trainer, which waits for the byte, computes again
    if pipe is not None:
        os.write(pipe[1], b".")
        for end in pipe:
            os.close(end)
