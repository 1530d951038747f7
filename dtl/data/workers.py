"""Processes for packing, indexing and verifying: each a fresh `python` that imports numpy, Pillow and simplejpeg, and nothing of the caller.

Not `multiprocessing`: its spawn runs the caller's main module again in every child (for training that is torch, 5 s each; for a script
without a `__main__` guard it is an error), and its fork copies a process that may have threads and a CUDA context. Tasks and answers
are JSON lines; a child ends when its input ends, so also when the parent is killed.

What is done is a module, by its name: `open_job(facts) -> job` is called once a process, with what the parent knows of the job;
`run_task(job, task)` does one task and returns its answer. JSON can hold facts, tasks and answers; none of them is read from a file.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from dtl.credentials import environment
from dtl.errors import UserError
from dtl.machine import end_process, fresh_python

# Where a whole group is asked to end (Slurm does), a child has ended before its parent knows why: that must not be reported as a fault.
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SECONDS_TO_KNOW = 2.0


def run_tasks(work: str, facts: dict[str, Any], tasks: Iterable[dict[str, Any]], *, processes: int, done: Callable[[Any], None]) -> None:
    """Run all tasks, in this process where `processes` is 1; `done(answer)` after each, in any order. The first error ends it all."""
    if processes == 1:
        module = importlib.import_module(work)
        job = module.open_job(dict(facts))
        for task in tasks:
            done(module.run_task(job, task))
        return
    children = [_Child(work, facts) for _ in range(processes)]
    try:
        for answer in _run_parallel(children, iter(tasks)):
            done(answer)
    finally:
        for child in children:
            child.close()


def _run_parallel(children: list[_Child], tasks: Iterator[dict[str, Any]]) -> Iterator[Any]:
    idle: SimpleQueue[_Child] = SimpleQueue()
    for child in children:
        idle.put(child)

    def ask(task: dict[str, Any]) -> Any:
        child = idle.get()
        try:
            return child.ask(task)
        finally:
            idle.put(child)

    pool = ThreadPoolExecutor(len(children))
    try:
        running: set[Future[Any]] = set()
        for task in tasks:
            running.add(pool.submit(ask, task))
            if len(running) >= 2 * len(children):
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        # Closing the children unblocks the threads that wait for an answer of theirs.
        for child in children:
            child.close()
        pool.shutdown(cancel_futures=True)


class _Child:
    """One worker process, asked one task at a time."""

    def __init__(self, work: str, facts: dict[str, Any]) -> None:
        command = fresh_python("dtl.data.workers", "serve", work)
        # A session of its own: Ctrl-C reaches the parent, which closes the children in good order.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment())
        self._closed = False
        self._facts: dict[str, Any] | None = facts  # goes with the first task

    def ask(self, task: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._facts is not None:
                self._process.stdin.write(json.dumps(self._facts) + "\n")
                self._facts = None
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if not line:
            status = self._process.wait()
            if -status in _ENDING_SIGNALS and not self._closed:
                time.sleep(_SECONDS_TO_KNOW)
            raise RuntimeError(f"a worker process exited with status {status} during {task}; it may have run out of memory")
        answer = json.loads(line)
        if answer["kind"] == "done":
            return answer["answer"]
        if answer["kind"] == "user":
            raise UserError(answer["message"])
        if answer["kind"] == "memory":
            raise MemoryError(answer["message"])
        if answer["kind"] == "os":
            raise OSError(answer["errno"], answer["message"], answer["filename"])
        raise RuntimeError(f"a worker process failed during {task}:\n{answer['message']}")

    def close(self) -> None:
        """End it at once: whatever it was writing is still under a temporary name."""
        self._closed = True
        end_process(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):  # a task that the child did not live to read
                stream.close()


def serve(work: str) -> None:
    """The child's life: the job in the first line, then a task a line in, an answer a line out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not be taken for an answer
    module = importlib.import_module(work)
    first = sys.stdin.readline()
    if not first:
        return
    job = module.open_job(json.loads(first))
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"kind": "done", "answer": module.run_task(job, json.loads(line))}
        except UserError as error:
            answer = {"kind": "user", "message": str(error)}
        except OSError as error:
            answer = {"kind": "os", "errno": error.errno, "message": error.strerror, "filename": str(error.filename or "")}
        except MemoryError as error:
            answer = {"kind": "memory", "message": str(error)}
        except Exception:
            answer = {"kind": "fault", "message": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
