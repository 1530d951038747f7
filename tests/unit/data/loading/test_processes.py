"""Loader processes that do not begin: a fork beside other threads may leave one waiting for a lock for ever."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run, wait_for
from tiny_images import image_folder
from torch.utils.data import DataLoader

from dtl.data.loading import processes as loader_process
from dtl.data.loading.loader import StepLoader
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import eval_transform


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("images")
    pack(image_folder(folder / "images", {"ant": 7, "bee": 6}), folder / "packed", processes=1, progress=False)
    return Shards.open(folder / "packed")


def samples(shards: Shards, workers: int) -> list[tuple[list[int], torch.Tensor]]:
    plan = EpochPlan(shards.shard_sizes, seed=1, epoch=0, global_batch_size=4)
    layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=None)
    loader = StepLoader(shards, eval_transform(image_size=8), plans=lambda epoch: plan, layout=layout, rank=0, image_size=8, seed=1, workers=workers)
    return [(batch.samples.tolist(), batch.images.clone()) for (batch,) in loader.steps(0, 0, plan.num_steps)]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_hangs_in_its_fork_is_replaced(tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    begin, pids = loader_process._init_worker, tmp_path / "pids"

    def hangs_once(*arguments: Any) -> None:
        try:
            pids.open("x").write(str(os.getpid()))
        except FileExistsError:
            return begin(*arguments)
        while True:
            time.sleep(60)

    monkeypatch.setattr(loader_process, "_init_worker", hangs_once)
    monkeypatch.setattr(loader_process, "START_SECONDS", 1.0)
    open_before = len(os.listdir("/proc/self/fd"))
    found, expected = samples(shards, workers), samples(shards, 0)
    assert [numbers for numbers, _ in found] == [numbers for numbers, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1


def test_one_that_dies_as_it_begins_is_told_at_once(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_process, "_init_worker", lambda *arguments: os._exit(3))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        samples(shards, 1)
    assert time.monotonic() - started < loader_process.START_SECONDS


def test_an_interrupt_while_they_begin_leaves_none_behind(tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the interpreter's exit, which sends SIGTERM and waits: they ignore it."""
    pids = tmp_path / "pids"

    def told(*arguments: Any) -> None:
        pids.write_text(str(os.getpid()))

    def interrupted(*arguments: Any) -> bool:
        wait_for(lambda: pids.exists() and pids.read_text() != "", what="the process to begin")
        raise KeyboardInterrupt

    monkeypatch.setattr(loader_process, "_init_worker", told)
    monkeypatch.setattr(loader_process, "_all_started", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:  # whose traceback keeps the iterator alive, as an error on its way up does
        samples(shards, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    assert caught.tb is not None


class _Freed:
    """Notes in which process it is freed, as a CUDA tensor must not be in a forked one."""

    def __init__(self, place: Path) -> None:
        self.place, self.cycle = place, self

    def __del__(self) -> None:
        self.place.write_text(str(os.getpid()))


class _Collecting(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return int(gc.isenabled())


def test_a_loader_process_frees_no_garbage_of_the_trainer(tmp_path: Path) -> None:
    place, thresholds = tmp_path / "freed", gc.get_threshold()
    gc.disable()
    try:
        _Freed(place)
        gc.set_threshold(1)
        batches = loader_process.start_processes(lambda options: iter(DataLoader(_Collecting(), batch_size=None, **options)), 1)
        assert not gc.isenabled()
        try:
            assert list(batches) == [1, 1], "it collects its own"
        finally:
            loader_process.end_processes(batches)
        assert not place.exists()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    gc.collect()
    assert int(place.read_text()) == os.getpid()


def test_the_trainers_freed_memory_is_not_kept_by_a_loader_process(tmp_path: Path, shards: Shards) -> None:
    """Activations that are free when it is forked, and used again: they were there twice."""
    job = run([str(shards.folder)], cwd=tmp_path, command="process_tree:private_memory_of_a_loader")
    assert int(job.out()) < 100
