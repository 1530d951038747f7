"""Loader processes: how they start, what they answer to, and how they end; the same for all that is read in processes of its own."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from dtl.machine import end_with_parent

PREFETCH = 2
"""Batches that each process makes ahead."""
BEGIN_SECONDS = 20.0
"""How long processes may take to begin before they are started again."""
T = TypeVar("T")


def begun(make: Callable[[dict[str, Any]], Iterator[T]], workers: int) -> Iterator[T]:
    """`make(options)`, the iterator of a DataLoader with these options, once all of its processes have begun.

    In Pythons without the mend of python/cpython#112275 (3.12 has it) a forked process may wait for ever for a lock of the interpreter's that
    another thread held at that moment, such as one of gloo's that lets go of a tensor; 3.11.7 was seen in it. Where one has not begun in
    time, all are ended and others are started, by `make` once more.
    """
    if sys.platform == "linux" and workers:
        for attempt in (1, 2):
            pipe = os.pipe()
            batches: Iterator[T] = iter(())
            all_begin = False
            try:
                batches = make(process_options(workers, pipe))
                all_begin = _all_begin(batches, workers, pipe[0], attempt * BEGIN_SECONDS)
            finally:
                for end in pipe:
                    os.close(end)
                if not all_begin:  # or Ctrl-C came meanwhile
                    end_processes(batches)
            if all_begin:
                return batches
    return make(process_options(workers))


def _all_begin(batches: Any, workers: int, reading: int, seconds: float) -> bool:
    until, heard = time.monotonic() + seconds, 0
    while heard < workers and time.monotonic() < until:
        if select.select([reading], [], [], 0.2)[0]:
            heard += len(os.read(reading, workers))
        elif not all(process.is_alive() for process in batches._workers):
            return True  # the DataLoader says what became of it
    return heard == workers


def process_options(workers: int, pipe: tuple[int, int] | None = None) -> dict[str, Any]:
    """What a DataLoader with `workers` processes is given; 0: it loads in the process itself.

    `pipe`: its ends, to which each writes a byte when it begins. Whoever iterates it calls `end_processes` when done, also after an error.
    """
    # The base seed is unused, and must not be drawn from the training's generator.
    options: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator()}
    if workers:
        options["worker_init_fn"] = partial(_init_worker, os.getpid(), pipe)
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


def _init_worker(parent: int, pipe: tuple[int, int] | None, worker: int) -> None:
    """Signals to the job are the trainer's to answer: a loader process that dies of one would break the step that is to be saved."""
    # torch's loader processes look for their parent while they wait for work, not while nobody takes what they have.
    end_with_parent(parent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    if pipe is not None:
        os.write(pipe[1], b".")
        for end in pipe:
            os.close(end)
