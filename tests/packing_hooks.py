"""What tests do to the packing of real runs, by `before` of the harness: it dawdles while a file is there, and what each rank does is written down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtl.data import open as cache
from dtl.data import workers as pack_pool
from dtl.data.packing import pack
from dtl.data.packing import tasks as pack_tasks
from dtl.data.packing.job import Job
from dtl.data.shards import index

QUICK_TASKS = 2


def slow_alone() -> None:
    """In the run's own process: tasks from the third on wait while there is a file `hold`; `reads` gets a byte for each image read."""
    real, read, parent = pack_tasks.run_task, Job.read, os.getppid()

    def slow(job: Job, task: dict[str, Any]) -> int:
        # A test that kills the parent leaves `hold` there: its children must not wait for ever.
        while task["number"] >= QUICK_TASKS and Path("hold").exists() and os.getppid() == parent:
            Path("held").touch()
            time.sleep(0.05)
        return real(job, task)

    def counted(job: Job, sample: int) -> bytes:
        _add("reads", ".")
        return read(job, sample)

    pack_tasks.run_task, Job.read = slow, counted  # type: ignore[method-assign]


def slow_children() -> None:
    """The same in two processes of packing."""
    pack._default_processes = lambda source: 2
    real = pack_pool.fresh_python

    def slowed(*arguments: str) -> list[str]:
        *start, code = real(*arguments)
        return [*start, f"import packing_hooks; packing_hooks.slow_alone(); {code}"]

    pack_pool.fresh_python = slowed


def count_work() -> None:
    """`listed-RANK` and `hashed-RANK` get a byte for each source that the rank lists and each index that it hashes."""
    cache.open_source = _counting("listed", cache.open_source)
    index.sha256_of_file = _counting("hashed", index.sha256_of_file)


def another_node() -> None:
    """This rank is the first of a node of its own, with a GPU that no rank of the other has."""
    os.environ |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": os.environ["RANK"]}


def count_work_of_another_node() -> None:
    another_node()
    count_work()


def slow_network(num_classes: int) -> Any:
    """`networks:small`, whose building waits on rank 0 while there is a file `hold`."""
    from networks import small  # torch, which the processes of packing do not need

    while os.environ.get("RANK", "0") == "0" and Path("hold").exists():
        Path("held").touch()
        time.sleep(0.05)
    return small(num_classes)


def _counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        _add(f"{name}-{os.environ.get('RANK', '0')}", ".")
        return work(*arguments, **options)

    return counted


def _add(name: str, text: str) -> None:
    with open(name, "a") as file:
        file.write(text)
