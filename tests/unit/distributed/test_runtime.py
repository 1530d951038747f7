"""What is left of a run's signals and threads when it is over."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch

from dtl.distributed.runtime import Runtime, use_fast_kernels
from dtl.errors import UserError
from dtl.training.session import debug_mode


def test_a_gpu_is_hurried_but_not_while_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[str, bool, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    for name in ("DTL_DEBUG", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # `debugging` leaves them behind; undone with this
    before = state()
    with Runtime(device="cpu"):
        assert state() == before, "on CPUs nothing is changed"
    assert before == ("highest", False, True)
    with debug_mode(True):
        assert state() == ("highest", False, False), "convolutions have a switch of their own"
    assert state() == before
    try:
        use_fast_kernels(True)
        assert state() == ("high", True, True)
        with debug_mode(True):
            assert state() == ("highest", False, False)
        assert state() == ("high", True, True)
    finally:
        use_fast_kernels(False)
        torch.backends.cudnn.allow_tf32 = True


def test_a_gpu_is_not_looked_for_in_a_launch_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would train on the CPU without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=r"run\.device is cuda, but the launch configuration asks for CPUs"):
        Runtime(device="cuda")


def test_a_runtime_alone_joins_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process of two makes a report: it must not wait for the other, nor end the group that they share."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    runtime = Runtime.alone("cpu")
    assert (runtime.rank, runtime.world_size, runtime.group, runtime.precision) == (0, 1, None, "no")
    assert runtime.agree("a") == "a"
    with runtime.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("it is not ours"))
    runtime.close()


def test_nothing_of_a_run_outlives_it() -> None:
    """A thread with the last reference to the process group made processes abort (status -6) at the end of a run that went well.

    A child that has inherited the sockets, as loader processes do, must not keep the thread alive either.
    """
    handler, before = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    sys.stdout.flush()
    with Runtime(device="cpu") as runtime:
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"signals"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: forking with threads; this child only sleeps
            child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    left = set(threading.enumerate()) - before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not left
    assert signal.getsignal(signal.SIGTERM) == handler
    gone = weakref.ref(runtime)
    del runtime
    assert gone() is None
