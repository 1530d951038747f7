"""The lab, and a desk to submit from. One cluster serves all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk
from harness import wait_for
from lab import SlurmLab, why_not


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    problem = why_not()
    if problem:
        pytest.skip(problem)
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


@pytest.fixture
def desk(lab: SlurmLab, tmp_path: Path) -> Iterator[Desk]:
    yield Desk(lab, tmp_path)
    lab.call("scancel", "--user=root")
    wait_for(lambda: not lab.call("squeue", "--noheader"), seconds=60, what="all jobs to be gone")
