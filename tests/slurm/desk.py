"""Submitting the templates, and watching the jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import status, steps_done, wait_for
from lab import SlurmLab

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 150.0  # for anything a job does; a start takes 5 s on an idle machine, and a minute on one that is busy
POLL = 0.3  # seconds; each question starts processes, which take the time of the jobs that it is about


@dataclass
class SlurmJob:
    """A submitted job, and the run that it works on."""

    lab: SlurmLab
    number: str
    folder: Path
    run: Path

    @property
    def state(self) -> str:
        return self.lab.job(self.number)["JobState"]

    @property
    def rounds(self) -> int:
        """How often it was requeued."""
        return int(self.lab.job(self.number)["Restarts"])

    @property
    def log(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.out")))

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        try:
            wait_for(condition, seconds=SECONDS, what=f"job {self.number} {what}", every=POLL)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.lab.job(self.number)}\n{self.log[-6000:]}\n{self.lab.logs()}") from None

    def wait_for_step(self, step: int) -> None:
        self.wait(f"to reach step {step}", lambda: steps_done(self.run) >= step)

    def wait_for_state(self, *states: str) -> None:
        self.wait(f"to be {' or '.join(states)}", lambda: self.state in states)

    def wait_for_round(self, number: int) -> None:
        self.wait(f"to begin round {number}", lambda: self.rounds == number)

    def wait_until_done(self) -> None:
        self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.state == "COMPLETED", self.log[-6000:]
        assert status(self.run)["state"] == "done"


class Desk:
    """Where a test submits: a folder of its own, as a user's."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.jobs: list[str] = []
        self.hold = folder / "hold"
        self.environment = {
            "DTL_HOME": str(ROOT),
            "DTL_PYTHON": sys.executable,
            "DTL_LAUNCH": "launch/cpu_2.yaml",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests/slurm")]),
            "HOLD": str(self.hold),
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": "1",
        }

    def submit(self, template: str, *arguments: str, options: Sequence[str] = (), run: str = "runs/tiny", **environment: str) -> SlurmJob:
        number = self.lab.call(
            "sbatch", "--parsable", *options, str(ROOT / "slurm" / template), *arguments,
            cwd=self.folder, env=self.environment | environment,
        ).strip()  # fmt: skip
        self.jobs.append(number)
        return SlurmJob(self.lab, number, self.folder, self.folder / run)

    def close(self) -> None:
        """Ends what was submitted from here."""
        for number in self.jobs:
            self.lab.call("scancel", number)
        wait_for(lambda: not self.lab.call("squeue", "--noheader", f"--jobs={','.join(self.jobs)}"), seconds=60, what="all jobs to be gone", every=POLL)
