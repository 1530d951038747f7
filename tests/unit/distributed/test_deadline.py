"""When a run has to stop: by its own deadline, or by the end of its Slurm allocation as far as anybody knows it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path

from dtl.distributed.deadline import Deadline

NOBODY = {"PATH": "/nowhere"}


def squeue(folder: Path, end: datetime) -> dict[str, str]:
    """An environment in whose Slurm the job ends at `end`."""
    tool = folder / "squeue"
    tool.write_text(f"#!/bin/sh\necho {end.isoformat(timespec='seconds')}\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}


def in_seconds(seconds: float) -> str:
    return str(int(time.time() + seconds))


def test_without_a_deadline_nothing_is_due() -> None:
    assert Deadline(None, started=0.0, environment=NOBODY).due() is None


def test_a_deadline_leaves_time_for_the_longest_save_and_step() -> None:
    deadline = Deadline(100.0, started=time.monotonic() - 45, environment=NOBODY)
    assert deadline.due() is None
    deadline.saw_save(20.0)
    deadline.saw_save(2.0)
    assert deadline.due() is None
    deadline.saw_step(5.0)
    assert deadline.margin == 2 * 20.0 + 3 * 5.0
    assert deadline.due() == "checkpoint.deadline_seconds"


def test_the_allocation_ends_when_slurm_has_said() -> None:
    environment = {**NOBODY, "SLURM_JOB_ID": "7"}
    assert Deadline(None, started=0.0, environment={**environment, "SLURM_JOB_END_TIME": in_seconds(60)}).due() is None
    assert Deadline(None, started=0.0, environment={**environment, "SLURM_JOB_END_TIME": in_seconds(15)}).due() == "the end of the allocation"
    assert Deadline(None, started=0.0, environment={**environment, "SLURM_JOB_END_TIME": "never"}).due() is None


def test_where_the_environment_does_not_say_squeue_does(tmp_path: Path) -> None:
    assert Deadline(None, started=0.0, environment=squeue(tmp_path, datetime.now() + timedelta(seconds=60))).due() is None
    assert Deadline(None, started=0.0, environment=squeue(tmp_path, datetime.now() + timedelta(seconds=10))).due() == "the end of the allocation"


def test_an_allocation_that_was_given_more_time_is_used(tmp_path: Path) -> None:
    environment = {**squeue(tmp_path, datetime.now() + timedelta(hours=1)), "SLURM_JOB_END_TIME": in_seconds(10)}
    assert Deadline(None, started=0.0, environment=environment).due() is None
