"""The lab, and a desk to submit from. One cluster serves all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk
from lab import SlurmLab, why_not


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    problem = why_not()
    if problem:
        pytest.skip(f"a real Slurm is started for these: {problem}")
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


@pytest.fixture
def desk(lab: SlurmLab, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(lab, tmp_path)
    yield desk
    desk.close()
