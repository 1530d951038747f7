"""Loader processes end with their parent, also when it is killed; a run leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from harness import history, start, wait_for
from recipes import write_recipe


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_loader_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Stopped first, so that they stand with full hands when it is killed: torch's own would wait for good."""
    phases = {"all": {"train": "all", "epochs": 500, "lr": 0.01, "eval_every": 400}}
    job = start(["--config", str(write_recipe(tmp_path, phases=phases, data={"workers": 3}))], cwd=tmp_path)
    file = tmp_path / "runs/tiny/history.jsonl"
    wait_for(lambda: file.exists() and len(history(file.parent)) > 2, what="some steps")
    pid = job.processes[0].pid
    assert pid is not None
    workers = children(pid)
    assert len(workers) >= 3
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    job.kill()
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=10, what="the loader processes to end")
