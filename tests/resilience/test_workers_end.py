"""Loader processes end with their parent, also when it is killed; a run leaves no process behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness import Job, history, start, wait_for
from model_folders import model_folder, write_image
from process_tree import children
from recipes import write_recipe

from dtl.data.loading.loader import BatchDataset
from dtl.inference import predict as prediction


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_full_hands(job: Job) -> set[int]:
    """The loader processes of a trainer that is stopped, so that they stand with batches that nobody takes."""
    pid = job.processes[0].pid
    assert pid is not None
    workers = children(pid)
    assert len(workers) >= 3
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    return workers


def test_loader_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Stopped first, so that they stand with full hands when it is killed: torch's own would wait for good."""
    phases = {"all": {"train": "all", "epochs": 500, "lr": 0.01, "eval_every": 400}}
    job = start(["--config", str(write_recipe(tmp_path, phases=phases, data={"workers": 3}))], cwd=tmp_path)
    file = tmp_path / "runs/tiny/history.jsonl"
    wait_for(lambda: file.exists() and len(history(file.parent)) > 2, what="some steps")
    workers = with_full_hands(job)
    job.kill()
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=10, what="the loader processes to end")


def test_those_of_a_prediction_too(tmp_path: Path) -> None:
    """Signals to all of a job, as Ctrl-C is one, are their parent's to answer; they end when it does, with full hands too."""
    write_image(tmp_path / "a.jpg", 0, size=(24, 24))
    (tmp_path / "many.txt").write_text("a.jpg\n" * 30_000)
    arguments = [str(model_folder(tmp_path / "model")), "many.txt", "--batch-size", "1", "--workers", "3", "--device", "cpu"]
    job = start(arguments, command="predict", cwd=tmp_path)
    wait_for(lambda: job.out().count("\n") > 20, what="some predictions")
    workers = with_full_hands(job)
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    assert all(alive(worker) for worker in workers)
    job.kill()
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=10, what="the loader processes to end")


def break_loading() -> None:
    """A mistake of ours in a loader process, at its third batch."""
    calls = itertools.count(1)
    for kind, name in ((BatchDataset, "__getitems__"), (prediction._Batches, "__getitem__")):
        whole = getattr(kind, name)

        def broken(self: object, asked: object, whole: Callable[..., object] = whole) -> object:
            if next(calls) == 3 and multiprocessing.parent_process() is not None:
                raise RuntimeError("our own mistake")
            return whole(self, asked)

        setattr(kind, name, broken)


@pytest.mark.parametrize("command", ["train", "predict"])
def test_an_error_in_one_ends_the_command(tmp_path: Path, command: str) -> None:
    """It hung: the error's traceback kept the loader's iterator, and Python's exit waited for processes that ignore SIGTERM."""
    if command == "train":
        phases = {"all": {"train": "all", "epochs": 5, "lr": 0.01}}
        arguments = ["--config", str(write_recipe(tmp_path, phases=phases, data={"workers": 2}))]
    else:
        write_image(tmp_path / "a.jpg", 0, size=(24, 24))
        (tmp_path / "many.txt").write_text("a.jpg\n" * 500)
        arguments = [str(model_folder(tmp_path / "model")), "many.txt", "--batch-size", "1", "--workers", "2", "--device", "cpu"]
    job = start(arguments, command=command, cwd=tmp_path, by_rank={0: {"before": "tests.resilience.test_workers_end:break_loading"}})
    job.wait(60).check(1)
    assert "our own mistake" in job.err()
