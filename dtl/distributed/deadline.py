"""When the run must have left the machine: `checkpoint.deadline_seconds` after its start, or the end of its Slurm allocation.

It stops by itself early enough to save: by twice the longest save so far and three times the longest step (the one under way, and one more
before all ranks know), and a moment to leave.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime

LEAVING_SECONDS = 1.0
# Slurm ends a job with little warning, and its clock is not this machine's.
LEAVING_SECONDS_OF_SLURM = 20.0


class Deadline:
    """Asked by the main process at each step. `seconds`: after `started` (by time.monotonic); the allocation's end comes on its own."""

    def __init__(self, seconds: float | None, *, started: float, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self._own = None if seconds is None else started + seconds
        self._allocation = self._end_of_allocation()
        self._longest_save = self._longest_step = 0.0

    def saw_save(self, seconds: float) -> None:
        self._longest_save = max(self._longest_save, seconds)

    def saw_step(self, seconds: float) -> None:
        self._longest_step = max(self._longest_step, seconds)

    @property
    def margin(self) -> float:
        """Seconds before the end at which the run has to stop."""
        return 2 * self._longest_save + 3 * self._longest_step

    def due(self) -> str | None:
        """Why the run has to stop now, or None."""
        now = time.monotonic()
        if self._own is not None and now >= self._own - self.margin - LEAVING_SECONDS:
            return "checkpoint.deadline_seconds"
        if self._allocation is not None and now >= self._allocation - self.margin - LEAVING_SECONDS_OF_SLURM:
            # It may have been given more time since; where nobody can be asked, what is known counts.
            before, self._allocation = self._allocation, self._end_of_allocation(ask_first=True) or self._allocation
            if self._allocation <= before + 1.0:
                return "the end of the allocation"
        return None

    def _end_of_allocation(self, *, ask_first: bool = False) -> float | None:
        """By time.monotonic; None outside Slurm, or for a job without an end."""
        job = self._environment.get("SLURM_JOB_ID")
        if not job:
            return None
        given = self._environment.get("SLURM_JOB_END_TIME", "")
        end = None if ask_first or not given.isdigit() else float(given)
        if end is None:
            end = _ask_squeue(job, self._environment)
        return None if end is None else time.monotonic() + end - time.time()


def _ask_squeue(job: str, environment: Mapping[str, str]) -> float | None:
    """The job's end, in seconds since 1970; None where squeue is not found (in containers), does not answer, or knows no end."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%e"], capture_output=True, text=True, timeout=10, check=True, env=dict(environment)
        )
        return datetime.fromisoformat(done.stdout.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
