"""What tests change in a process before its run: `before` in tests/harness.py, as gpu.hooks:FUNCTION."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import sys
import textwrap
from multiprocessing.util import Finalize
from types import SimpleNamespace
from typing import Any

import torch
from gpusim import plugin


def contexts() -> None:
    """Say at the end on which devices this process has a context."""
    Finalize(None, lambda: print(f"contexts {_contexts()}", file=sys.stderr, flush=True), exitpriority=1)


def _contexts() -> list[int]:
    if plugin.is_simulated():
        return plugin.contexts()
    driver, found = ctypes.CDLL("libcuda.so.1"), []
    for device in range(torch.cuda.device_count()):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        if driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0 and active.value:
            found.append(device)
    return found


def sanitizer() -> None:
    import torch.cuda._sanitizer

    torch.cuda._sanitizer.enable_cuda_sanitizer()


def no_waits_in_a_step() -> None:
    """A training step in which the host waits for its device is an error.

    But for DDP's own two waits: once a phase, the second step's forward sets up its buckets anew; and in each of the first ten steps and in every
    hundredth it reads the clocks of the step before. And in fp16 the scaler must know whether the gradients are finite: one wait a step."""
    from dtl.training.step import Stepper

    step, update, waited = Stepper.step, torch.amp.GradScaler._maybe_opt_step, [0]

    def scalers(*args: Any, **more: Any) -> Any:
        before = plugin.num_waits() if plugin.is_simulated() else 0
        torch.cuda.set_sync_debug_mode("default")
        try:
            return update(*args, **more)
        finally:
            torch.cuda.set_sync_debug_mode("error")
            waited[0] += plugin.num_waits() - before if plugin.is_simulated() else 0

    torch.amp.GradScaler._maybe_opt_step = scalers  # type: ignore[method-assign]

    def watched(self: Stepper, *args: Any, **more: Any) -> float:
        before = plugin.num_waits() if plugin.is_simulated() else 0
        if self.runtime.world_size > 1:
            if more["phase_step"] == 1:
                return step(self, *args, **more)
            self.active.wrapped.logger = SimpleNamespace(set_runtime_stats_and_log=lambda: None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            lr = step(self, *args, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        of_scaler, waited[0] = waited[0], 0
        waits = plugin.num_waits() - before - of_scaler if plugin.is_simulated() else 0
        print(f"a step with {waits} waits" + f", and {of_scaler} of the scaler" * bool(of_scaler), file=sys.stderr)
        assert waits == 0, f"the host waited {waits} times in step {more['step']}"
        return lr

    Stepper.step = watched  # type: ignore[method-assign]


def waits_and_contexts() -> None:
    """Both of the above."""
    contexts()
    no_waits_in_a_step()


def little_memory() -> None:
    """This process may take LITTLE_MEMORY MiB of its GPU."""
    device = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_per_process_memory_fraction((int(os.environ["LITTLE_MEMORY"]) << 20) / torch.cuda.get_device_properties(device).total_memory, device)


def memory_ends() -> None:
    """From the fourth step on this process gets no more memory of its GPU, as if another process had taken it."""
    from dtl.training.step import Stepper

    step = Stepper.step

    def watched(self: Stepper, *args: Any, **more: Any) -> float:
        if more["step"] == 3:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((1 << 20) / torch.cuda.get_device_properties(self.runtime.device).total_memory, self.runtime.device)
        return step(self, *args, **more)

    Stepper.step = watched  # type: ignore[method-assign]


def own_gpu() -> None:
    """As srun --gpus-per-task=1 and Kubernetes do it: this process sees one GPU, the first one of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["RANK"]


def two_nodes() -> None:
    """As a wrapper around srun on two nodes of two GPUs each: nothing says how many processes a node has."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1" if rank < 2 else "2,3"


MUTATIONS = {
    "the step does not wait for the copy": ("dtl.models.network:Normalise._moved", "current.wait_stream(self._copies)", "pass"),
    "labels stay on the host": ("dtl.training.step:Stepper.loss_sum", "labels, weights = labels.to(device, non_blocking=True),", "labels, weights = labels,"),
    "the host reads device memory": (
        "dtl.checkpoint.resume.store:_copy_into",
        "return buffer.copy_(tensor, non_blocking=pinned)",
        "ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size()); return buffer",
    ),
    "a checkpoint is written before its copies have landed": (
        "dtl.checkpoint.resume.store:_wait_for_copies",
        "torch.cuda.synchronize(device)",
        "pass",
    ),
}
"""Lines for GPUs, broken: the function, what stands there, and what shall."""


def broken() -> None:
    """dtl with the line of $MUTATION broken."""
    where, old, new = MUTATIONS[os.environ["MUTATION"]]
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    function: Any = module
    for name in path.split("."):
        function = getattr(function, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{where} has another line now"
    changed: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), module_name, "exec"), module.__dict__, changed)
    function.__code__ = changed[function.__name__].__code__  # whoever has imported the function has it too
    print(f"broken: {os.environ['MUTATION']}", file=sys.stderr)
