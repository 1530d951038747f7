"""A rank that hangs, dies, or cannot be reached: the others name it, its stage and its samples, and end in bounded time."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Job, history, start, status, the_line, wait_for
from recipes import write_recipe

PHASES: dict[str, Any] = {"all": {"train": "all", "epochs": 500, "lr": 0.01}}
RESUMES = "the same command resumes"


def begin(folder: Path, *options: str, world: int = 2, **more: Any) -> Job:
    """A long run that has taken its first steps."""
    recipe = write_recipe(folder, phases=PHASES, data={"workers": 0}, checkpoint={"every_steps": 5}, model={"name": "obstacles:small"})
    job = start(["--config", str(recipe), *options], cwd=folder, world=world, **more)
    file = folder / "runs/tiny/history.jsonl"
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or (file.exists() and len(history(file.parent)) > 2), what="some steps")
    return job


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_was_killed_is_named_at_once(tmp_path: Path, rank: int) -> None:
    job = begin(tmp_path, world=3)
    job.kill(rank)
    job.wait(60)
    line = the_line(job, RESUMES)
    if rank:
        assert re.search(rf"lost rank {rank} \(host \S+, pid {job.processes[rank].pid}\), which has ended; it was last in stage \w+ of step \d+", line), line
    else:
        assert "rank 0" in line
    told = status(tmp_path / "runs/tiny")
    assert told["state"] == "failed"
    assert told["why"].startswith("fault: lost ")
    assert told["step"] > 0
    assert [code for other, code in enumerate(job.codes) if other != rank] == [1, 1]


def test_a_rank_that_is_stopped_is_named_within_the_limit(tmp_path: Path) -> None:
    job = begin(tmp_path, "--run.timeout-minutes", "0.2")
    job.kill(1, signal.SIGSTOP)
    job.processes[0].join(60)
    job.kill(1)
    line = the_line(job, RESUMES)
    assert re.search(r"no progress for \d+ s \(run.timeout_minutes\): waiting for rank 1 \(host \S+, pid \d+\), which is stopped \(SIGSTOP\)", line), line
    assert job.codes[0] == 1
    assert status(tmp_path / "runs/tiny")["why"].startswith("fault: no progress")


def test_a_rank_that_sleeps_in_its_loader_is_named_with_its_samples(tmp_path: Path) -> None:
    job = begin(tmp_path, "--run.timeout-minutes", "0.2", env={"SLEEP_ON": "1"})
    (tmp_path / "sleep").touch()
    job.wait(60)
    first = next(line for line in job.err().splitlines() if "no progress for" in line and "in stage load" in line)  # on a slow machine it may speak earlier
    for line in (first, the_line(job, RESUMES)):
        assert re.search(r"waiting for rank 1 \(host \S+, pid \d+\), in stage load of step \d+, 60 samples starting at", line), line
        assert re.search(r"starting at \d{6} of \S+\.tar, for \d+ s", line), line
    assert job.codes == [1, 1]


def test_a_single_process_that_hangs_says_where(tmp_path: Path) -> None:
    job = begin(tmp_path, "--run.timeout-minutes", "0.2", world=1, env={"SLEEP_ON": "0"})
    (tmp_path / "sleep").touch()
    job.wait(60)
    assert re.search(r"no progress for \d+ s.*: rank 0 .* in stage load of step \d+, 120 samples starting at", the_line(job, RESUMES))


def test_a_job_that_was_suspended_as_a_whole_continues(tmp_path: Path) -> None:
    """For longer than the watchdog's limit (12 s), and than the one that gloo was started with (42 s): scontrol suspend, gang scheduling, a closed lid."""
    job = begin(tmp_path, "--run.timeout-minutes", "0.2")
    for rank in range(2):
        job.kill(rank, signal.SIGSTOP)
    time.sleep(48)
    for rank in range(2):
        job.kill(rank, signal.SIGCONT)
    before = len(history(tmp_path / "runs/tiny"))
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or len(history(tmp_path / "runs/tiny")) > before + 2, what="more steps")
    job.kill(0, signal.SIGTERM)
    job.wait(60)
    assert status(tmp_path / "runs/tiny")["state"] == "stopped", job.err()
    assert "run.timeout_minutes" not in job.err(), "what ends a run"
