"""The end of a run: with the model on the disk the ranks part, and only the main process makes the report, for as long as it takes."""

from __future__ import annotations

import time
from pathlib import Path

from harness import start, status, wait_for
from recipes import write_recipe

SHORT = {"all": {"train": "all", "steps": 2, "lr": 0.05}}


def test_no_rank_waits_for_the_report(tmp_path: Path) -> None:
    """And the doctor of the one that makes it does not take the others for lost, also when a stall is told (after a sixth of the limit)."""
    world, hold = 3, tmp_path / "hold"
    hold.touch()
    recipe = write_recipe(tmp_path, phases=SHORT, tracking={"report": True})
    by_rank = {0: {"before": "paced:report"}}
    job = start(["--config", str(recipe), "--run.timeout-minutes", "0.2"], cwd=tmp_path, world=world, env={"HOLD": str(hold)}, by_rank=by_rank)
    try:
        wait_for(lambda: all(process.exitcode is not None for process in job.processes[1:]) or None, what="the other ranks' end")
        assert [process.exitcode for process in job.processes] == [None, *[0] * (world - 1)]
        assert status(tmp_path / "runs/tiny")["state"] == "done"
        assert (tmp_path / "runs/tiny/model/model.json").is_file()
        assert "images of 10 classes" in job.err(0)
        time.sleep(4.0)
        assert job.processes[0].is_alive(), job.err()
    finally:
        hold.unlink()
    job.wait().check(0)
    assert status(tmp_path / "runs/tiny")["state"] == "done"
    assert (tmp_path / "runs/tiny/report/index.html").is_file()
    assert "report       " in job.err(0)
    for word in ("lost", "waiting for", "rank 1", "cannot be reached", "could not be made"):
        assert word not in job.err().replace("waiting for data", ""), job.err()
