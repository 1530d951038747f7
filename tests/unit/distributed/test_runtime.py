"""What is left of a run's signals and threads when it is over."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from dtl.distributed.determinism import deterministic_kernels
from dtl.distributed.launch import read_launch
from dtl.distributed.runtime import Runtime, _local_rank_of_gpu, _names_of_gpu, use_fast_kernels
from dtl.errors import UserError
from dtl.training.session import debug_mode


def test_a_gpu_is_hurried_but_not_while_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[str, bool, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    monkeypatch.setenv("DTL_DEBUG", "")  # `debug_mode` leaves it behind; undone with this
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
        with deterministic_kernels(True):
            use_fast_kernels(True)
            assert state() == ("high", False, True), "cuDNN chooses no kernel by its timing"
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


@pytest.mark.parametrize(("visible", "local_rank", "number"), [(1, 3, "0"), (8, 3, "3"), (2, 3, "1")])
def test_a_rank_that_sees_one_gpu_computes_on_it(monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, number: str) -> None:
    """srun --gpus-per-task=1, Kubernetes. (That two ranks do not share one is checked once they have met.)"""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    launch = read_launch(dict(os.environ), [])
    with _local_rank_of_gpu(launch, use_cpu=False):
        assert os.environ["LOCAL_RANK"] == number
    assert os.environ["LOCAL_RANK"] == str(local_rank)
    with _local_rank_of_gpu(launch, use_cpu=True):
        assert os.environ["LOCAL_RANK"] == str(local_rank)


def test_a_gpu_has_the_names_by_which_ranks_that_share_it_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    slice_of_first = SimpleNamespace(uuid="7a", pci_domain_id=0, pci_bus_id=193, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: slice_of_first)
    assert _names_of_gpu(torch.device("cuda", 0)) == ("GPU-7a", f"{socket.gethostname()} 0000:c1:00")
    assert _names_of_gpu(torch.device("cpu")) == ()


def test_what_torch_warns_of_is_printed_by_one_rank() -> None:
    """DDP's line about strides came once a rank."""
    filters = list(warnings.filters)
    for rank in (0, 1):
        runtime = Runtime.alone("cpu")
        runtime.rank = rank
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with runtime:
                warnings.warn_explicit("Grad strides do not match", UserWarning, "graph.py", 1, module="torch.autograd.graph")
                warnings.warn_explicit("of another package", UserWarning, "x.py", 1, module="torchlike")
        assert [str(one.message) for one in caught] == ["Grad strides do not match", "of another package"][rank:]
    assert warnings.filters == filters
