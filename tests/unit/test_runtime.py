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

from dtl.engine.debug import debugging
from dtl.runtime import Runtime, hurry_gpu


def test_a_gpu_is_hurried_but_not_while_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    for name in ("DTL_DEBUG", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # `debugging` leaves them behind; undone with this
    before = state()
    with Runtime(device="cpu"):
        assert state() == before, "on CPUs nothing is changed"
    assert before == ("highest", False)
    try:
        hurry_gpu(True)
        assert state() == ("high", True)
        with debugging(True):
            assert state() == ("highest", False)
        assert state() == ("high", True)
    finally:
        hurry_gpu(False)


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
