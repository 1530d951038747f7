"""The very templates on a real Slurm of several virtual nodes, with a recipe for CPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from desk import Desk, SlurmJob
from harness import history, run, status
from lab import SlurmLab
from recipes import weights_hash, write_recipe

PHASES: dict[str, Any] = {
    "head": {"train": "head", "steps": 4, "lr": 0.1, "optimizer": "adamw"},
    "all": {"train": "all", "steps": 20, "lr": 0.05, "ema": 0.9, "mixup": 0.2, "eval_every": 1},
}


def recipe(folder: Path) -> str:
    return write_recipe(folder, model={"name": "paced:small"}, data={"global_batch_size": 24}, phases=PHASES).name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same recipe, uninterrupted and without Slurm, by world size."""
    runs = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"reference-{world}")
        run(["--config", recipe(folder)], cwd=folder, world=world, env={"HOLD": str(folder / "hold")})
        runs[world] = folder / "runs/tiny"
    return runs


def assert_same(run: Path, reference: Path) -> None:
    assert weights_hash(run) == weights_hash(reference)
    assert history(run) == history(reference)


@pytest.fixture(scope="module")
def limited(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SlurmJob, Future[dict[str, Any]]]]:
    """A job on its way to its time limit, and the status that the first round will leave. Slurm looks every 30 s whom to warn, and
    lets a job start again after ten more; the test that comes first uses that time."""
    desk = Desk(lab, tmp_path_factory.mktemp("limited"))
    desk.hold.touch()
    job = desk.submit("single_gpu.sbatch", recipe(desk.folder), options=["--gpus-per-node=0"], DTL_LAUNCH="")
    job.wait_for_step(6)
    lab.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=3")

    def follow() -> dict[str, Any]:
        job.wait_for_round(1)
        left = status(job.run)
        lab.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        desk.hold.unlink()
        return left

    with ThreadPoolExecutor(1) as thread:
        yield job, thread.submit(follow)
    desk.close()


def test_a_multi_node_job_trains_to_the_end(desk: Desk, reference: dict[int, Path], limited: object) -> None:
    job = desk.submit("multi_node.sbatch", recipe(desk.folder), options=["--gpus-per-node=1"])
    job.wait_until_done()
    assert_same(job.run, reference[2])
    assert "2 rank(s) on n[1-2]" in job.log
    assert job.log.count("memory of each of 2 processes") == 2, "the dry run prints a line for each of the two phases, from one node"
    assert job.log.count("dry run done") == 1
    logs = sorted(str(file.relative_to(job.run)) for file in job.run.glob("slurm/*/round-0/node-*/*/attempt_0/0/stderr.log"))
    assert [name.split("/")[3] for name in logs] == ["node-0", "node-1"]


def test_a_job_that_reaches_its_time_limit_goes_on_in_the_next_round(reference: dict[int, Path], limited: tuple[SlurmJob, Future[dict[str, Any]]]) -> None:
    job, following = limited
    left = following.result()
    assert left["state"] == "stopped"
    assert left["step"] < 24
    job.wait_until_done()
    assert_same(job.run, reference[1])
    assert job.rounds == 1
    assert "stopped after saving; requeued" in job.log


def test_a_preempted_job_goes_on_when_the_nodes_are_free_again(desk: Desk, lab: SlurmLab, reference: dict[int, Path]) -> None:
    desk.hold.touch()
    job = desk.submit("single_node.sbatch", recipe(desk.folder), options=["--gpus-per-node=2"], DTL_DRY_RUN="off")
    job.wait_for_step(6)
    lab.call("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2", cwd=desk.folder)
    job.wait_for_state("PENDING")
    assert status(job.run)["state"] == "stopped"
    desk.hold.unlink()
    job.wait_until_done()
    assert_same(job.run, reference[2])


def test_a_job_that_loses_a_node_goes_on_with_others(desk: Desk, lab: SlurmLab, reference: dict[int, Path]) -> None:
    desk.hold.touch()
    job = desk.submit("multi_node.sbatch", recipe(desk.folder), options=["--gpus-per-node=1"], DTL_DRY_RUN="off")
    job.wait_for_step(6)
    try:
        lab.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        job.wait_for_round(1)
        desk.hold.unlink()
        job.wait_until_done()
    finally:
        lab.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert "on n[1,3]" in job.log
    assert_same(job.run, reference[2])


def test_an_array_element_trains_its_fold_for_dtl_folds(desk: Desk) -> None:
    config, options, short = recipe(desk.folder), ["--array=2", "--gpus-per-node=0"], ["--phases.all.steps", "2", "--data.workers", "0"]
    job = desk.submit("array_folds.sbatch", "2", config, *short, options=options, run="runs/tiny-folds/fold-2", DTL_LAUNCH="", DTL_DRY_RUN="off")
    job.wait_until_done()
    added = run(["--config", config, "--folds", "2", *short], cwd=desk.folder, command="folds", env={"HOLD": str(desk.folder / "hold")})
    assert "over 2 folds: top1" in added.out()
    assert "run runs/tiny-folds/fold-1: " in added.err()
    assert "run runs/tiny-folds/fold-2: " not in added.err(), "it is done"


def test_an_array_searches_with_as_many_workers_as_it_has_elements(desk: Desk) -> None:
    config = recipe(desk.folder)
    (desk.folder / "space.yaml").write_text("phases.all.lr: [0.02, 0.05, 0.1]\n")
    words = [config, "--space", "space.yaml", "--budget", "3", "--phases.all.steps", "3", "--data.workers", "0"]
    job = desk.submit("array_search.sbatch", *words, options=["--array=1-2", "--gpus-per-node=0"], run="runs/tiny-search")
    job.wait("to end", lambda: not desk.lab.call("squeue", "--noheader", f"--jobs={job.number}"))
    assert job.log.count("\nwinner: trial ") == 2, job.log[-6000:]
    assert job.log.count(": done: runs/tiny-search") == 2
    for number in (1, 2):
        assert f"worker {number} of 2, round 0, search runs/tiny-search" in job.log
    assert json.loads((job.run / "results.json").read_text())["trials"][-1]["trial"] in (1, 2, 3)


def test_a_sweep_leaves_its_results_side_by_side(desk: Desk, reference: dict[int, Path]) -> None:
    lines = ["# the first is the recipe as it is", "--run.seed 0", "", "--phases.all.lr 0.02 --run.seed '1'", "--phases.all.lrr 1"]
    (desk.folder / "lr.txt").write_text("\n".join(lines) + "\n")
    config, options = recipe(desk.folder), ["--array=1-3", "--gpus-per-node=0"]
    job = desk.submit("array_sweep.sbatch", config, "lr.txt", "--data.workers", "0", options=options, DTL_LAUNCH="", DTL_DRY_RUN="off")
    folder = desk.folder / "runs/lr"
    names = ["1-seed0", "2-lr0.02-seed1"]
    job.wait("to end", lambda: not job.lab.call("squeue", "--noheader", f"--jobs={job.number}"))
    assert sorted(path.name for path in folder.iterdir()) == names, job.log
    assert [status(folder / name)["state"] for name in names] == ["done", "done"]
    assert weights_hash(folder / names[0]) == weights_hash(reference[1]) != weights_hash(folder / names[1])
    assert "phases.all.lrr" in job.log  # the mistake of one line ends one element, at once
