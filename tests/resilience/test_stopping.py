"""Asked to stop by a signal, a deadline, or Slurm's time limit: in time, with a checkpoint, on all ranks together, with status 75."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Job, history, run, start, status, wait_for
from recipes import write_recipe

LONG: dict[str, Any] = {"all": {"train": "all", "epochs": 500, "lr": 0.01}}


def recipe(folder: Path, *, phases: dict[str, Any] = LONG, **checkpoint: Any) -> list[str]:
    file = write_recipe(folder, phases=phases, data={"workers": 0}, checkpoint={"every_steps": None, **checkpoint}, model={"name": "obstacles:small"})
    return ["--config", str(file)]


def begin(folder: Path, *options: str, lines: int = 2, world: int = 1, **more: Any) -> Job:
    job = start([*recipe(folder), *options], cwd=folder, world=world, **more)
    file = folder / "runs/tiny/history.jsonl"
    wait_for(lambda: not all(process.is_alive() for process in job.processes) or (file.exists() and len(history(file.parent)) > lines), what="some steps")
    return job


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "runs/tiny/checkpoints").glob("step-*"))


@pytest.mark.parametrize("world", [2])
def test_a_deadline_is_kept_with_a_checkpoint(tmp_path: Path, world: int) -> None:
    started = time.monotonic()
    run([*recipe(tmp_path), "--checkpoint.deadline-seconds", "8"], cwd=tmp_path, world=world, code=75)
    assert time.monotonic() - started < 30  # the harness and a busy machine aside
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["why"]) == ("stopped", "checkpoint.deadline_seconds")
    assert checkpoints(tmp_path)[-1] == told["step"] > 0


def test_the_end_of_a_slurm_allocation_is_known(tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 27), "PATH": "/usr/bin:/bin"}
    run(recipe(tmp_path), cwd=tmp_path, env=environment, code=75)
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["why"]) == ("stopped", "the end of the allocation")
    assert checkpoints(tmp_path)[-1] == told["step"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_ctrl_c_ends_at_once_even_in_the_middle_of_a_stage(tmp_path: Path, world: int) -> None:
    job = begin(tmp_path, world=world, env={"SLEEP_ON": str(world - 1)})
    (tmp_path / "sleep").touch()
    time.sleep(1.0)  # rank 0 is in a collective now, or in its loader
    assert all(process.is_alive() for process in job.processes)
    job.kill(number=signal.SIGINT)
    time.sleep(0.3)
    assert all(process.is_alive() for process in job.processes)
    asked = time.monotonic()
    job.kill(number=signal.SIGINT)
    job.wait(60)
    assert time.monotonic() - asked < 10
    assert job.codes == [130] * world
    assert status(tmp_path / "runs/tiny")["why"] == "interrupted"


def test_a_signal_while_a_checkpoint_is_being_written(tmp_path: Path) -> None:
    """The save that is under way counts: it is waited for, and not begun again."""
    job = begin(tmp_path, "--checkpoint.every-steps", "4", env={"SLOW_DISK": "0.5"}, lines=1)
    wait_for(lambda: [*(tmp_path / "runs/tiny/checkpoints").glob(".writing-*")], what="a save")
    job.kill(number=signal.SIGUSR1)
    job.wait().check(75)
    told = status(tmp_path / "runs/tiny")
    assert told["state"] == "stopped"
    assert checkpoints(tmp_path)[-1] == told["step"]
    assert not [*(tmp_path / "runs/tiny/checkpoints").glob(".*")]


def test_starts_that_get_nowhere_are_told(tmp_path: Path) -> None:
    """Requeued again and again before the first checkpoint: status.json says so."""
    for number in range(1, 5):
        job = start(recipe(tmp_path), cwd=tmp_path)
        wait_for(lambda number=number: _starts(tmp_path) == number, what="the start to be counted")
        job.kill()
    assert status(tmp_path / "runs/tiny")["why"].startswith("start number 4 in a row from step 0, without a new checkpoint")
    run([*recipe(tmp_path), "--checkpoint.deadline-seconds", "6"], cwd=tmp_path, code=75)
    run([*recipe(tmp_path), "--checkpoint.deadline-seconds", "6"], cwd=tmp_path, code=75)
    assert _starts(tmp_path) == 1


def _starts(folder: Path) -> int:
    file = folder / "runs/tiny/status.json"
    return int(status(file.parent).get("progress", {}).get("starts", 0)) if file.exists() else 0


def mount(folder: Path) -> bool:
    """A file system of 32 KiB there; whether that is allowed."""
    words = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(words, check=False, capture_output=True).returncode == 0


def disks() -> list[str]:
    """A write that finds the disk full can be had everywhere, a disk that is full where one may be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        if not mount(Path(folder)):
            return ["refused"]
        subprocess.run(["umount", folder], check=True)
    return ["refused", "mounted"]


class SmallDisk(NamedTuple):
    """Where the checkpoints go; `variables` are for the run's processes."""

    variables: dict[str, str]
    grow: Callable[[], object]


@pytest.fixture(params=disks())
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    if request.param == "refused":
        full = tmp_path / "full"
        full.touch()
        yield SmallDisk({"FULL_DISK": str(full)}, full.unlink)
        return
    folder = tmp_path / "runs/tiny/checkpoints"
    folder.mkdir(parents=True)
    assert mount(folder)
    yield SmallDisk({}, lambda: subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True))
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_tried_again(tmp_path: Path, small_disk: SmallDisk) -> None:
    job = begin(tmp_path, "--checkpoint.every-steps", "6", "--checkpoint.max-failures", "1000", env=small_disk.variables)
    wait_for(lambda: "No space left on device" in job.err(), what="a word about the disk")
    assert "the next save tries again" in job.err()
    small_disk.grow()
    wait_for(lambda: checkpoints(tmp_path), what="a checkpoint")
    job.kill(number=signal.SIGTERM)
    job.wait().check(75)
    assert checkpoints(tmp_path)[-1] == status(tmp_path / "runs/tiny")["step"]


@pytest.mark.parametrize("world", [2])
def test_a_disk_that_stays_full_ends_the_run_on_all_ranks(tmp_path: Path, small_disk: SmallDisk, world: int) -> None:
    job = begin(tmp_path, "--checkpoint.every-steps", "3", "--checkpoint.max-failures", "2", world=world, env=small_disk.variables)
    job.wait().check(2)
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert len(lines) == 1, job.err()
    assert "2 checkpoints in a row could not be written" in lines[0]
    assert "No space left on device" in lines[0]


def test_a_folder_that_vanishes_is_made_anew(tmp_path: Path) -> None:
    import shutil

    job = begin(tmp_path, "--checkpoint.every-steps", "6")
    wait_for(lambda: checkpoints(tmp_path), what="a checkpoint")
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints", ignore_errors=True)
    wait_for(lambda: checkpoints(tmp_path), what="another checkpoint")
    job.kill(number=signal.SIGTERM)
    job.wait().check(75)
