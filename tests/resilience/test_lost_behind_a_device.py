"""A rank is lost while the others wait for their devices, where nothing between ranks tells them: on GPUs the usual case. It is named, and they end."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from harness import Job, start, status, steps_done, the_line, wait_for
from recipes import write_recipe

SECONDS = 20.0
"""10 to 12 without other load. Launchers wait 30 s between SIGTERM and SIGKILL."""


def begin(folder: Path, *options: str, world: int, **env: str) -> Job:
    recipe = write_recipe(folder, phases={"all": {"train": "all", "epochs": 500, "lr": 0.01}}, data={"workers": 0}, tracking={"log_every": 1})
    held = {rank: {"before": "obstacles:waiting_device"} for rank in range(world)}
    (folder / "device").touch()
    job = start(["--config", str(recipe), *options], cwd=folder, world=world, env={"HOLD_FROM": "8", **env}, by_rank=held)
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or steps_done(folder / "runs/tiny") > 2, what="some steps")
    time.sleep(1.0)
    return job


def test_a_rank_that_was_killed(tmp_path: Path) -> None:
    job = begin(tmp_path, world=3)
    job.kill(1)
    killed = time.monotonic()
    job.wait(120)
    assert time.monotonic() - killed < SECONDS
    assert job.codes == [1, -9, 1]
    line = the_line(job, "the same command resumes")
    assert re.search(rf"lost rank 1 \(host \S+, pid {job.processes[1].pid}\), which has ended; it was last in stage \w+ of step \d+;", line), line
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["why"][:18]) == ("failed", "fault: lost rank 1")


def test_the_rank_that_holds_the_store(tmp_path: Path) -> None:
    """What the ranks know of each other is gone with it; nobody listens where it was."""
    job = begin(tmp_path, world=3)
    job.kill(0)
    killed = time.monotonic()
    job.wait(120)
    assert time.monotonic() - killed < SECONDS
    assert job.codes == [-9, 1, 1]
    assert "lost the main process (rank 0)" in the_line(job, "the same command resumes")
    assert status(tmp_path / "runs/tiny")["why"].startswith("fault: lost the main process (rank 0)")


def test_a_rank_with_an_error_of_its_own(tmp_path: Path) -> None:
    job = begin(tmp_path, world=2, RAISE_ON="1")
    held = time.monotonic()
    job.wait(120)
    assert time.monotonic() - held < SECONDS
    assert job.codes == [1, 1]
    assert "ZeroDivisionError: of one rank alone" in job.err(1)
    assert "Traceback" not in job.err(0)
    assert re.search(r"dtl: lost rank 1 \(host \S+, pid \d+\), which ended: of one rank alone; the same command resumes", job.err(0)), job.err(0)
    assert status(tmp_path / "runs/tiny")["state"] == "failed"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_not_lost(tmp_path: Path, rank: int) -> None:
    """Nor is a slow disk: only the time limit ends a wait for it."""
    job = begin(tmp_path, world=2)
    job.kill(rank, signal.SIGSTOP)
    time.sleep(12.0)
    assert all(process.is_alive() for process in job.processes), job.err()
    job.kill(rank, signal.SIGCONT)
    (tmp_path / "device").unlink()
    before = steps_done(tmp_path / "runs/tiny")
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or steps_done(tmp_path / "runs/tiny") > before + 2, what="more steps")
    job.kill(0, signal.SIGTERM)
    job.wait(120).check(75)
    assert "lost" not in job.err()


def test_a_rank_of_a_range_test(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases={"all": {"train": "all", "epochs": 1}}, data={"workers": 0})
    (tmp_path / "device").touch()
    held = {rank: {"before": "obstacles:waiting_device"} for rank in range(2)}
    job = start(["--config", str(recipe)], cwd=tmp_path, world=2, command="find-lr", by_rank=held, env={"RAISE_ON": "none"})
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or "up to 100 steps" in job.err(), what="the first step")
    time.sleep(2.0)
    job.kill(1)
    killed = time.monotonic()
    job.wait(120)
    assert time.monotonic() - killed < SECONDS
    assert job.codes == [1, -9]
    line = the_line(job, "nothing was written, and no weights were changed")
    assert re.search(rf"lost rank 1 \(host \S+, pid {job.processes[1].pid}\), which has ended; it was last in stage load of step 1;", line), line
