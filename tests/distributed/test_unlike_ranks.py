"""Ranks that differ in one thing: each case ends on all ranks, in one clear line, or does no harm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness import Job, history, run, start, status, the_line, wait_for
from recipes import write_recipe

PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 6, "lr": 0.05}}


def launch(folder: Path, **own: Any) -> Job:
    """Two ranks, the second of which has something of its own."""
    recipe = write_recipe(folder, phases=PHASES, data={"workers": 0})
    return start(["--config", str(recipe)], cwd=folder, world=2, by_rank={1: own})


def test_another_setting(tmp_path: Path) -> None:
    job = launch(tmp_path, arguments=["--phases.all.lr", "0.5"]).wait(60).check(2)
    assert "Traceback" not in job.err()
    assert re.search(r"not started with the same settings: phases.all.lr is 0.5 on rank 1 \(host \S+\), 0.05 on rank 0", the_line(job))
    assert not (tmp_path / "runs").exists()


def test_another_version_of_a_library(tmp_path: Path) -> None:
    job = launch(tmp_path, before="obstacles:other_torch").wait(60).check(2)
    assert re.search(r"the version of torch is '9.9.0' on rank 1 \(host \S+\), '\S+' on rank 0", the_line(job))


def test_another_precision(tmp_path: Path) -> None:
    """As of a node with older GPUs, or with none that works: each would choose by itself."""
    recipe = write_recipe(tmp_path, phases=PHASES, data={"workers": 0}, precision="auto")
    unlike = {0: {"before": "obstacles:without_bf16"}, 1: {"before": "obstacles:other_precision"}}
    job = start(["--config", str(recipe)], cwd=tmp_path, world=2, by_rank=unlike).wait(60).check(2)
    assert re.search(r"the precision is 'bf16' on rank 1 \(host \S+\), 'no' on rank 0", the_line(job))


def test_a_file_that_one_node_does_not_see(tmp_path: Path) -> None:
    job = launch(tmp_path, before="packing_hooks:another_node", arguments=["--data.train", "missing/photos"]).wait(60).check(2)
    assert "missing/photos" in the_line(job)
    assert "rank 1" in the_line(job)
    assert status(tmp_path / "runs/tiny")["why"].startswith("input: ")


def test_a_config_that_only_one_rank_cannot_read(tmp_path: Path) -> None:
    """It fails before the ranks have met; its launcher would end the others."""
    job = launch(tmp_path, arguments=["--phases.all.lrr", "0.5"])
    job.processes[1].join(60)
    job.kill()
    assert job.codes[1] == 2
    assert re.search(r"rank 1 \(host \S+\): .*phases.all.lrr", the_line(job))


def test_one_slow_disk_slows_all_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "quick").mkdir()
    launch(tmp_path / "slow", before="obstacles:slow_reads").wait().check(0)
    run(["--config", str(write_recipe(tmp_path / "quick", phases=PHASES, data={"workers": 0}))], cwd=tmp_path / "quick", world=2)
    assert history(tmp_path / "slow/runs/tiny") == history(tmp_path / "quick/runs/tiny")


def test_a_fault_of_one_rank_alone(tmp_path: Path) -> None:
    """Its own traceback tells of it; the other says who is gone and why, and does not wait."""
    job = launch(tmp_path, before="obstacles:failing_step").wait(60)
    assert job.codes[0] == 1
    assert job.codes[1] == 1
    assert "ZeroDivisionError: of one rank alone" in job.err(1)
    assert "Traceback" not in job.err(0)
    wait_for(lambda: status(tmp_path / "runs/tiny")["state"] == "failed", what="the status")
    assert re.search(r"lost rank 1 \(host \S+, pid \d+\), which ended: of one rank alone", job.err(0))
