"""A checkpoint takes one more copy of the state in host memory, and the next takes the same one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAVES = """
import pathlib, resource, sys, torch
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config.models import CheckpointConfig
folder, asynchronous = sys.argv[1], sys.argv[2] == "True"
def peak():
    if sys.platform != "linux":
        return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # There, ru_maxrss begins with that of the process that started this one.
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
small = CheckpointStore(folder + "/small", CheckpointConfig(asynchronous=asynchronous))
small.save(1, {"model": {"weight": torch.ones(10)}}, {}, wait=True)  # what is imported and allocated only once
state = {"model": {str(i): torch.randn(1 << 20) for i in range(16)}, "optimizer": {str(i): torch.randn(1 << 20) for i in range(32)}}
size = sum(4 * tensor.numel() for group in state.values() for tensor in group.values())
store, before = CheckpointStore(folder + "/large", CheckpointConfig(keep=1, asynchronous=asynchronous)), peak()
for step in range(1, 5):
    store.save(step, state, {})
    for group in state.values():
        for tensor in group.values():
            tensor.add_(1.0)
store.flush()
assert store.saved_step == 4
print((peak() - before) / size)
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_never_more_than_one_copy_of_the_state(asynchronous: bool, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAVES, str(tmp_path), str(asynchronous)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.1, "less than one would be no measurement"
