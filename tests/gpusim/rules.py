"""What holds on simulated GPUs. test_simulation.py calls each of these in a process that has two."""

from __future__ import annotations

import copy
import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gpusim import plugin
from torch import Tensor

N = 1000


def on_host() -> Tensor:
    return torch.arange(float(N)).pin_memory()


def raised(error: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except error as found:
        return str(found)
    raise AssertionError(f"no {error.__name__}")


def computes_what_the_cpu_computes() -> None:
    x = torch.randn(4, 3, 16, 16)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 5))
    there = copy.deepcopy(network).to("cuda")
    before = plugin.num_operators()
    found = there(x.cuda())
    assert plugin.num_operators() >= before + 5
    assert torch.equal(found.cpu(), network(x))


def fresh_memory_is_nan() -> None:
    fresh = [torch.empty(N, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    assert all(tensor.isnan().all() for tensor in fresh)


def the_host_cannot_read_device_memory() -> None:
    there = torch.zeros(N, device="cuda")
    assert there.cpu().sum() == 0
    ctypes.string_at(there.data_ptr(), 4)
    raise AssertionError("it can")


def a_copy_to_the_device_has_not_happened_until_its_stream_is_waited_for() -> None:
    host, stream = on_host(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = host.to("cuda", non_blocking=True)
    assert there.add(0).isnan().all(), "another stream computes with it at once"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(there.add(0).cpu(), host)


def a_copy_to_the_device_reads_the_host_late() -> None:
    host = on_host()
    there = host.to("cuda", non_blocking=True)
    host.zero_()
    assert there.sum() == 0


def a_copy_to_the_host_lands_when_the_host_waits() -> None:
    source = torch.ones(N, device="cuda")
    host = torch.zeros(N).pin_memory()
    host.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    source.mul(2).add(1)  # the device has gone past the copy
    assert host.isnan().all()
    event.synchronize()
    assert (host == 1).all()


def who_waits_for_a_stream_waits_for_what_it_has_waited_for() -> None:
    source, stream = torch.ones(N, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    host = torch.zeros(N).pin_memory()
    with torch.cuda.stream(stream):
        host.copy_(source, non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().synchronize()
    assert (host == 1).all()


def a_forked_process_has_no_gpus() -> None:
    torch.zeros(1, device="cuda")
    child = os.fork()
    if child == 0:
        malloc = ctypes.CDLL(None).cudaMalloc
        os._exit(malloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4096)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, "cudaErrorInitializationError"


def contexts_are_counted() -> None:
    assert plugin.contexts() == []
    torch.zeros(1, device="cuda:1")
    assert plugin.contexts() == [1]
    with torch.cuda.device(0):
        pass
    assert 0 in plugin.contexts()


def memory_ends() -> None:
    """With SIMCUDA_MEM_MB=64."""
    assert torch.cuda.mem_get_info()[1] == 64 << 20
    there = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")
    message = raised(torch.OutOfMemoryError, lambda: torch.zeros(80 << 20, dtype=torch.uint8, device="cuda"))
    assert "out of memory" in message
    assert there.sum() == 0
    torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")


def one_is_visible() -> None:
    """With CUDA_VISIBLE_DEVICES=1."""
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_name(0) == "Simulated GPU 1"


def it_may_be_an_old_one() -> None:
    """With SIMCUDA_CC=75."""
    assert torch.cuda.get_device_capability() == (7, 5)
    assert not torch.cuda.is_bf16_supported(including_emulation=False)


def two_devices_do_not_mix() -> None:
    a = torch.zeros(3, device="cuda:0")
    for b in (torch.zeros(3, device="cuda:1"), torch.zeros(3)):
        assert "same device" in raised(RuntimeError, lambda b=b: a + b)  # type: ignore[misc]
    assert (a + torch.tensor(1.0)).sum() == 3


def waits_of_the_host_are_noticed() -> None:
    there = torch.zeros(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    before = plugin.num_waits()
    there.add_(1)
    assert plugin.num_waits() == before
    assert "synchronizing" in raised(RuntimeError, there.sum().item)
    torch.cuda.set_sync_debug_mode("default")
    there.sum().item()
    assert plugin.num_waits() == before + 1


def values_that_decide_a_size_make_the_host_wait() -> None:
    there = torch.tensor([1.0, 0.0, 2.0], device="cuda")
    mask, rows = there > 0, torch.tensor([0, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    before = plugin.num_waits()
    there[rows] += there.index_select(0, rows)
    assert plugin.num_waits() == before
    for call in (lambda: there[mask], there.nonzero, lambda: torch.masked_select(there, mask), lambda: there.__setitem__(mask, there[rows])):
        assert "synchronizing" in raised(RuntimeError, call)
    torch.cuda.set_sync_debug_mode("default")
    assert there[mask].tolist() == [2, 4]


def the_sanitizer_sees_a_race() -> None:
    import torch.cuda._sanitizer as sanitizer

    sanitizer.enable_cuda_sanitizer()
    there, stream = torch.zeros(N, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        raised(Exception, lambda: there.mul_(2))


# ---- NCCL, on two ranks


def _meet() -> int:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    return rank


def collectives_combine() -> None:
    rank = _meet()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
        values = torch.tensor([1 + rank, 10 - rank], dtype=dtype, device="cuda")
        for op, expected in ((dist.ReduceOp.SUM, [3, 19]), (dist.ReduceOp.MAX, [2, 10]), (dist.ReduceOp.MIN, [1, 9]), (dist.ReduceOp.PRODUCT, [2, 90])):
            result = values.clone()
            dist.all_reduce(result, op=op)
            assert result.tolist() == expected, (dtype, op)
    mean = torch.tensor([1.0 + rank], device="cuda")
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    assert mean.item() == 1.5
    first = torch.full((3,), float(rank), device="cuda")
    dist.broadcast(first, 1)
    assert first.tolist() == [1, 1, 1]
    gathered = torch.empty(4, device="cuda")
    dist.all_gather_into_tensor(gathered, torch.tensor([rank, rank + 10.0], device="cuda"))
    assert gathered.tolist() == [0, 10, 1, 11]
    part = torch.empty(2, device="cuda")
    dist.reduce_scatter_tensor(part, torch.arange(4.0, device="cuda") + rank)
    assert part.tolist() == ([1, 3] if rank == 0 else [5, 7])
    dist.destroy_process_group()
    assert plugin.contexts() == [rank]


def a_rank_that_ended_is_waited_for() -> None:
    rank = _meet()
    dist.all_reduce(torch.ones(3, device="cuda"))
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(0)
    last = dist.all_reduce(torch.ones(3, device="cuda"), async_op=True)
    time.sleep(2)
    assert not last.is_completed()
    os._exit(0)
