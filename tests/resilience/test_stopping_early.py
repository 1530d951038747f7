"""Asked to stop before the first step, while images are packed or the network is built: at once, on all ranks, with status 75; and gone on with."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Job, run, start, status, wait_for
from recipes import write_images, write_recipe

IMAGES = {"cat": 80, "dog": 80}  # five chunks of reading
PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 3, "lr": 0.01}}


def recipe(folder: Path, *, model: str = "networks:small", **sections: Any) -> list[str]:
    photos = folder / "photos"
    if not photos.exists():
        write_images(photos, IMAGES)
    data = {"train": str(photos), "val_fraction": 0.2, "workers": 0, "global_batch_size": 16}
    return ["--config", str(write_recipe(folder, phases=PHASES, data=data, model={"name": model}, **sections))]


def begin(folder: Path, words: list[str], *, world: int, hook: str | None = "slow_children") -> Job:
    """A run that has come to where it is held."""
    (folder / "hold").touch()
    job = start(words, cwd=folder, world=world, by_rank={} if hook is None else {0: {"before": f"packing_hooks:{hook}"}}, packed=False)
    wait_for(lambda: (folder / "held").exists() or not job.processes[0].is_alive(), what="the stage that is held")
    time.sleep(0.5)  # the other ranks wait for it
    assert all(process.is_alive() for process in job.processes), job.err()
    return job


def packers(folder: Path) -> list[psutil.Process]:
    """The processes that pack for the test's run: they have its working folder."""
    found = [one for one in psutil.process_iter(["cmdline", "cwd"]) if "dtl.data.workers" in " ".join(one.info["cmdline"] or ())]
    return [one for one in found if one.info["cwd"] == str(folder)]


def to_all(job: Job, folder: Path) -> None:
    """As Slurm does: SIGTERM to every process of the step."""
    children = packers(folder)
    assert len(children) == 2
    for child in children:
        child.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # the worst order: what packs has ended before a rank hears anything
    job.kill(number=signal.SIGTERM)


STOPS: dict[str, tuple[int, str, Callable[[Job, Path], None]]] = {
    "alone": (1, "slow_children", lambda job, folder: job.kill(0, signal.SIGINT)),
    "in one process": (1, "slow_alone", lambda job, folder: job.kill(0, signal.SIGUSR1)),
    "the rank that packs": (2, "slow_children", lambda job, folder: job.kill(0, signal.SIGTERM)),
    "a rank that waits": (2, "slow_children", lambda job, folder: job.kill(1, signal.SIGUSR1)),
    "everything": (2, "slow_children", to_all),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_while_packing(tmp_path: Path, name: str) -> None:
    world, hook, stop = STOPS[name]
    words = recipe(tmp_path)
    job = begin(tmp_path, words, world=world, hook=hook)
    reads = tmp_path / "reads"
    wait_for(lambda: reads.exists() and len(reads.read_text()) == 64, what="the two chunks that are not held")
    time.sleep(0.5)  # until they are written
    asked = time.monotonic()
    stop(job, tmp_path)
    job.wait(60).check(75)
    assert time.monotonic() - asked < 15
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["why"], told["stage"], told["step"]) == ("stopped", "signal before the first step", "data", 0)
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert lines == [
        "dtl: stopped by a signal before the first step (stage data): nothing to save yet; packed and downloaded data is kept; run the same command again"
    ]
    assert not packers(tmp_path)
    assert not [*(tmp_path / "cache").rglob("*.tmp"), *(tmp_path / "cache").rglob("manifest.json")]
    assert sorted(path.name for path in (tmp_path / "runs/tiny").iterdir()) == ["lock", "status.json"]

    assert len(reads.read_text()) == 64
    (tmp_path / "hold").unlink()
    run(words, cwd=tmp_path, world=world, by_rank={0: {"before": f"packing_hooks:{hook}"}})
    assert status(tmp_path / "runs/tiny")["state"] == "done"
    assert len(reads.read_text()) == 2 * 160, "what was read before the stop is not read again"


@pytest.mark.parametrize("world", [1, 2])
def test_a_deadline_while_packing(tmp_path: Path, world: int) -> None:
    """It may strike while the run is on its way to where it is held, or there."""
    (tmp_path / "hold").touch()
    words = recipe(tmp_path, checkpoint={"deadline_seconds": 14})
    run(words, cwd=tmp_path, world=world, by_rank={0: {"before": "packing_hooks:slow_children"}}, code=75, timeout=60)
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["why"], told["stage"]) == ("stopped", "checkpoint.deadline_seconds before the first step", "data")
    assert not packers(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_one_rank_builds_its_network(tmp_path: Path, rank: int) -> None:
    """Rank 1 has built its own, and waits for rank 0 in a collective."""
    job = begin(tmp_path, recipe(tmp_path, model="packing_hooks:slow_network"), world=2, hook=None)
    asked = time.monotonic()
    job.kill(rank, signal.SIGTERM)
    job.wait(60).check(75)
    assert time.monotonic() - asked < 15
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["stage"]) == ("stopped", "model")
    assert job.err().splitlines()[-1].endswith("(stage model): nothing to save yet; the same command starts it again")


def test_a_second_ctrl_c_ends_packing_at_once(tmp_path: Path) -> None:
    job = begin(tmp_path, recipe(tmp_path), world=2)
    job.kill(0, signal.SIGSTOP)  # it cannot agree
    job.kill(1, signal.SIGINT)
    time.sleep(0.3)
    assert job.processes[1].is_alive()
    job.kill(1, signal.SIGINT)
    wait_for(lambda: not job.processes[1].is_alive(), what="the end of rank 1")
    assert job.codes[1] == 130
    job.kill()


def test_an_earlier_run_stays_as_it_was(tmp_path: Path) -> None:
    """With `run.resume: never` a stop before the run is begun afresh leaves the old one's status; else the status says where that one stands."""
    words = recipe(tmp_path)
    run(words, cwd=tmp_path)
    before = status(tmp_path / "runs/tiny")
    held = [*recipe(tmp_path, model="packing_hooks:slow_network"), "--phases.all.steps", "6"]
    (tmp_path / "held").unlink(missing_ok=True)
    for options, state in ((["--run.resume", "never"], "done"), ([], "stopped")):
        job = begin(tmp_path, [*held, *options], world=1, hook=None)
        job.kill(number=signal.SIGTERM)
        job.wait(60).check(75)
        (tmp_path / "held").unlink()
        told = status(tmp_path / "runs/tiny")
        assert (told["state"], told["step"], told["phases"], told["model"]) == (state, 3, before["phases"], before["model"])
    (tmp_path / "hold").unlink()
    run([*recipe(tmp_path), "--phases.all.steps", "6"], cwd=tmp_path)
    assert (status(tmp_path / "runs/tiny")["state"], status(tmp_path / "runs/tiny")["step"]) == ("done", 6)
