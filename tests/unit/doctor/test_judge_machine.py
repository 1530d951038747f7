"""The doctor's judgement of everything but GPUs: numbers in, findings out."""

from __future__ import annotations

from typing import Any

import pytest

from dtl.doctor.finding import worst
from dtl.doctor.judge_machine import GIB, MIB, Need, judge_disk, judge_memory, judge_native, judge_open_files, judge_shm, judge_versions

GOOD = {"torch": "2.14.1+cu130", "torchvision": "0.29.1", "accelerate": "1.15.0"}


@pytest.mark.parametrize(
    ("python", "changes", "said"),
    [
        ((3, 11, 7), {}, ""),
        ((3, 10, 13), {}, "Python 3.10.13; dtl needs 3.11 or newer"),
        ((3, 13, 0), {}, "Python 3.13.0; dtl needs 3.13.1 or newer"),
        ((3, 13, 1), {}, ""),
        ((3, 11, 7), {"torchvision": "0.28.0"}, "which needs torchvision 0.29"),
        ((3, 11, 7), {"accelerate": None}, "not installed: accelerate"),
        ((3, 11, 7), {"torch": "2.5.0", "torchvision": "0.20.0"}, "torch 2.5.0; dtl needs 2.9 or newer"),
    ],
)
def test_versions(python: tuple[int, ...], changes: dict[str, str | None], said: str) -> None:
    found = judge_versions(python, {**GOOD, **changes})
    assert worst(found) == ("fail" if said else "ok")
    assert any(said in one.summary for one in found)
    assert all(one.fix for one in found if one.status != "ok")


@pytest.mark.parametrize(
    ("free", "workers", "own_buffers", "status"),
    [
        (64 * MIB, 4, False, "fail"), (400 * MIB, 4, False, "ok"), (200 * MIB, 4, False, "warn"), (MIB, 0, False, "ok"), (None, 0, False, "ok"),
        (None, 2, False, "warn"), (64 * MIB, 4, True, "ok"), (16 * 1024, 4, True, "fail"),
    ],
)  # fmt: skip
def test_shared_memory_against_what_the_loader_keeps_in_it(free: int | None, workers: int, own_buffers: bool, status: str) -> None:
    """4 workers with 2 batches each and two in hand, for training and for validation, of 64 images of 3 * 224 * 224 bytes: 184 MiB.

    With buffers of its own (Linux) only semaphores, so that a container's 64 MiB do.
    """
    found = judge_shm(free, free, Need(workers=workers, own_buffers=own_buffers))
    assert found.status == status
    if status == "fail":
        assert "--shm-size" in found.fix
        assert "--data.workers 0" in found.fix


def test_open_files_memory_and_disks() -> None:
    assert judge_open_files(1_048_576, 1_048_576, Need()).status == "ok"
    assert judge_open_files(-1, -1, Need()).status == "ok"
    assert judge_open_files(128, 65536, Need()).fix == "ulimit -n 4096"
    assert judge_open_files(128, 300, Need()).fix == "ulimit -n 300"
    assert judge_memory(64 * GIB, None, Need()).status == "ok"
    low = judge_memory(64 * GIB, GIB, Need())
    assert low.status == "warn"
    assert "--mem" in low.fix


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", "ext4"),
        ({"problem": "Permission denied"}, "fail", "is not writable (Permission denied)"),
        ({"free": 100 * MIB}, "fail", "a run needs about"),
        ({"free": GIB}, "warn", "a run needs about"),
        ({"write_mib_s": 3.0}, "warn", "a checkpoint would take about"),
        ({"filesystem": "tmpfs"}, "warn", "is in memory"),
        ({"filesystem": "overlay"}, "warn", "deleted when the container ends"),
    ],
)
def test_disk(changes: dict[str, Any], status: str, said: str) -> None:
    facts = {"free": 500 * GIB, "total": 900 * GIB, "filesystem": "ext4", "write_mib_s": 800.0, "problem": None, **changes}
    (found,) = judge_disk("run", "runs", need=Need(), **facts)
    assert found.status == status
    assert said in found.summary
    assert bool(found.fix) == (status != "ok")


def test_a_native_extra_that_is_missing_is_no_warning_but_one_that_fails_is() -> None:
    assert judge_native("it was not built", False).status == "ok"
    broken = judge_native("it cannot be loaded", True)
    assert broken.status == "warn"
    assert "DTL_NATIVE=0" in broken.fix
    assert broken.fix.startswith("pip install --force-reinstall --no-deps . in dtl's source folder (")  # `dtl` on PyPI is not ours
