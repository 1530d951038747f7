"""/dev/shm: what loaders need is known before the first step, and it is what they really take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtl.data.loading.shared_memory import bytes_needed, check_shared_memory
from dtl.errors import UserError

# In a mount namespace of its own, with a /dev/shm of its own: nobody else's is touched.
NAMESPACE = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
MOUNTED = "mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {python} -c '{code}'"


def in_namespace(code: str, size: str, **env: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True, check=False).returncode:
        pytest.skip("needs root and mount namespaces")
    command = MOUNTED.format(size=size, python=sys.executable, code=code)
    return subprocess.run([*NAMESPACE, command], capture_output=True, text=True, check=False, env={**os.environ, **env})


SIZES = {"micro_batch_size": 256, "image_size": 224, "accumulation_steps": 1, "prefetch": 2}


def test_what_is_needed() -> None:
    """256 images of 224 x 224 in 8 loader processes: 616 MB of prefetched batches, and two in the trainer's hands; or only semaphores."""
    assert bytes_needed(**SIZES, workers=8, own_buffers=False) == pytest.approx(18 * 256 * 3 * 224**2, rel=0.002)
    assert bytes_needed(**SIZES, workers=8, own_buffers=True) == 9 * 6 * 4096
    assert bytes_needed(**SIZES, workers=0, own_buffers=False) == 0


def test_a_docker_containers_64_mib() -> None:
    code = """
from dtl.data.loading.shared_memory import check_shared_memory
check_shared_memory(30 * 2**20, ranks=2, workers=4)
try:
    check_shared_memory(30 * 2**20, ranks=3, workers=4)
except Exception as error:
    print(error)
"""
    done = in_namespace(code, "64m")
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has 64 MiB free of 64 MiB, but 3 processes with 4 loader processes each need up to 90 MiB there" in done.stdout
    assert "--shm-size 1g" in done.stdout
    assert "--data.workers N" in done.stdout


def test_where_there_is_none(tmp_path: Path) -> None:
    check_shared_memory(2**60, ranks=1, workers=1, folder=tmp_path / "nothing")
    check_shared_memory(0, ranks=1, workers=0)
    with pytest.raises(UserError, match=r"iB free of .*, but 1 process"):
        check_shared_memory(2**60, ranks=1, workers=1, folder=tmp_path)


LOADERS = """
import os, sys, time
from pathlib import Path
from dtl.data.shards.index import Shards
from dtl.data.loading.loader import StepLoader
from dtl.data.loading.processes import PREFETCH
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.loading.shared_memory import bytes_needed
from dtl.config.models import AugmentConfig
from dtl.data.transforms.transforms import train_transform
shards = Shards.open(os.environ["SHARDS"])
plan = EpochPlan(shards.shard_sizes, seed=0, epoch=0, global_batch_size=64)
layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=16)
options = dict(plans=lambda epoch: plan, layout=layout, rank=0, image_size=96, seed=0, workers=3)
loader = StepLoader(shards, train_transform(image_size=96, augment=AugmentConfig()), **options)
most = 0
for number, batches in enumerate(loader.steps(0, 0, plan.num_steps)):
    time.sleep(0.3)
    space = os.statvfs("/dev/shm")
    most = max(most, (space.f_blocks - space.f_bfree) * space.f_frsize)
    if number == 7:
        break
sizes = dict(micro_batch_size=16, image_size=96, accumulation_steps=layout.accumulation_steps)
print(most, bytes_needed(**sizes, workers=3, prefetch=PREFETCH, own_buffers=True))
"""


@pytest.mark.soak
def test_it_is_what_loaders_really_take(tmp_path: Path) -> None:
    """In a /dev/shm of 256 KiB, where one batch of 442 KB would not fit: no batch goes through it."""
    from dtl.data.packing.pack import pack

    pack("digits", tmp_path / "digits", processes=1, progress=False)
    done = in_namespace(LOADERS, "256k", SHARDS=str(tmp_path / "digits/train"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    most, need = map(int, done.stdout.split())
    assert 0 < most <= need


def test_one_that_cannot_be_written_is_a_line() -> None:
    code = "from dtl.data.loading.shared_memory import *; print(fits(4096, ranks=1)); check_shared_memory(4096, ranks=1, workers=1)"
    done = in_namespace(code, "1m,ro")
    assert done.stdout == "False\n"
    assert "UserError: /dev/shm cannot be written, but loader processes need it for their queues" in done.stderr
    assert "(--data.workers 0)" in done.stderr
