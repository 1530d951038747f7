"""`data.micro_batch_size: auto`: the largest micro-batch that fits into memory, agreed upon by all ranks before a phase's first step.

A rank that runs out of memory in the middle of a step leaves the others in an all-reduce. So each phase begins with a trial: forward
and backward of one made-up micro-batch on each rank by itself, no collective inside, no update after it. All ranks tell whether it
fitted; where it did not on any of them, all halve and try again. The global batch and its order are the plan's, whatever the
micro-batch is. What fitted is kept in the checkpoint's state. On GPUs a trial leaves some memory free. Composer has the idea of halving
until it fits; its trial is the step.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtl.checkpoint.resume.state import TrainState
from dtl.config.models import ImageSize
from dtl.data.loading.batch import Batch
from dtl.distributed.determinism import operators_noted
from dtl.distributed.runtime import Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.models.network import Normalise, image_shape
from dtl.models.norms import norms_alone
from dtl.text import counted
from dtl.training.active import ActivePhase, Trained
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase
from dtl.training.step import Stepper

# What torch raises where memory ends; the words of a RuntimeError tell.
PERHAPS_FULL = (torch.OutOfMemoryError, RuntimeError, MemoryError)
_CPU_WORDS = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive", "std::bad_alloc")
# Where a device is nearly full, CUDA's libraries have words of their own.
_GPU_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_TRIED = 2
"""Images that show which operators a network uses."""
ROOM = 0.05
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "solve": 0}


def fit(active: ActivePhase, loaders: DataLoaders, runtime: Runtime, *, normalise: Normalise, state: TrainState | None, log: Callable[[str], None]) -> bool:
    """Halve `loaders.micro_batch_size` until a micro-batch of the phase fits on every rank; True where it had to.

    All ranks call it together. Weights, statistics, gradients and generators are afterwards as before. UserError where not even
    the smallest micro-batch fits.
    """
    phase, halved = active.phase, False
    while True:
        layout = loaders.layout(phase)
        size = layout.micro_batch_size
        room = _room(runtime.device) if size > layout.unit else 0
        problems = runtime.gather(_trial(active, size, loaders.image_size, runtime, normalise, room))
        if not any(problems):
            break
        rank = next(i for i, problem in enumerate(problems) if problem)
        if size <= layout.unit:
            size_setting = "data.image_size" if phase.config.image_size is None else f"phases.{phase.name}.image_size"
            raise UserError(
                f"phase {phase.name}: not even {counted(size, 'image')} fits into memory (rank {rank}: {problems[rank]}); "
                f"use a smaller {size_setting} or model, model.checkpoint_activations: true, or precision bf16"
            )
        loaders.micro_batch_size = max(layout.unit, -(-size // 2))
        halved = True
        log(f"phase {phase.name}: a micro-batch of {size} images does not fit into memory (rank {rank}: {problems[rank]}); trying {loaders.micro_batch_size}")
    if halved:
        times = f"{layout.accumulation_steps} per step on each of {counted(runtime.world_size, 'process')}"
        log(f"phase {phase.name}: micro-batches of {size} fit, {times}; the global batch stays {loaders.global_batch_size}")
        if state is not None:
            state.phase.micro_batch_size = size
    return halved


def unstable_operators(active: ActivePhase, loaders: DataLoaders, runtime: Runtime, *, normalise: Normalise) -> list[str]:
    """The operators without a deterministic kernel in a forward and backward pass of the phase, of any rank. All ranks call it together."""
    found: list[str] = []
    with operators_noted(found), runtime.autocast():
        _trial(replace(active, wrapped=Trained(active.module), cut=None), loaders.layout(active.phase).unit * _TRIED, loaders.image_size, runtime, normalise)
    return list(dict.fromkeys(name for names in runtime.gather(found) for name in names))


def explain(error: Exception, loaders: DataLoaders, phase: Phase) -> None:
    """Raise what says what to do, where a step ran out of memory after all (others took it meanwhile)."""
    if _is_out_of_memory(error):
        size = loaders.layout(phase).micro_batch_size
        raise RuntimeError(
            f"out of memory in a micro-batch of {size}, which fitted before: another process may be using this device; "
            f"--data.micro-batch-size {max(1, size // 2)} resumes from the newest checkpoint with the same global batches"
        ) from error


def _room(device: torch.device) -> int:
    """Bytes of a GPU that a trial leaves free: what only just fits meets fragmented memory later, or a workspace of NCCL or cuDNN.

    Not on CPUs: a process gets its memory there as it uses it, and shares it with all others."""
    if device.type != "cuda":
        return 0
    # A single process has the device "cuda", without a number, which the first of these does not take.
    return int(ROOM * torch.cuda.get_per_process_memory_fraction() * torch.cuda.get_device_properties(device).total_memory)


def _trial(active: ActivePhase, size: int, image_size: ImageSize, runtime: Runtime, normalise: Normalise, room: int = 0) -> str:
    """Why a micro-batch of `size` does not fit here beside `room` bytes; empty where it does."""
    buffers = list(active.module.buffers())
    kept = [buffer.detach().clone() for buffer in buffers]
    problem, ballast = "", None
    with rng_restored(runtime.device), modes_restored(active.module), norms_alone():
        try:
            ballast = torch.empty(room, dtype=torch.uint8, device=runtime.device)  # held while the trial computes
            _compute(active, size, image_size, runtime, normalise)
        except PERHAPS_FULL as error:
            if not _is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0].split(". ")[0][:120] or "out of memory"
        finally:
            del ballast
            for parameter in active.parameters:
                parameter.grad = None
            with torch.no_grad():
                for buffer, value in zip(buffers, kept):
                    buffer.copy_(value)
    if problem or room:
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        elif hasattr(ctypes.CDLL(None), "malloc_trim"):
            # Freed memory is kept on CPUs (see dtl.distributed.runtime): the next trial would find the limit taken by what this one left.
            ctypes.CDLL(None).malloc_trim(0)
    return problem


def _compute(active: ActivePhase, size: int, image_size: ImageSize, runtime: Runtime, normalise: Normalise) -> None:
    batch = Batch(
        images=torch.zeros(image_shape(active.network.module, size, image_size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
        labels=torch.zeros(size, dtype=torch.int64),
        weights=torch.ones(size),
        samples=torch.arange(size),
        slots=torch.arange(size),
        epoch=0,
        step=0,
    )
    if active.cut is not None:
        # Trained on features, which the whole network gives once, without gradients.
        with torch.no_grad(), runtime.accelerator.autocast():
            active.module(normalise(batch.images))
        return
    # Accelerate's autocast is on the network that DDP wraps: without DDP there is no collective that a lone rank could leave others in.
    wrapped = active.wrapped
    inner = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped
    stepper = Stepper(replace(active, wrapped=inner), runtime, normalise=normalise, seed=0, heart=Heartbeat())
    with _eager(inner):
        loss = stepper.loss_sum(batch)
        runtime.accelerator.backward(loss / size)
    _moments(active)


def _moments(active: ActivePhase) -> list[Tensor]:
    """Memory that the optimizer takes at its first step, beside weights and gradients."""
    optimizer: torch.optim.Optimizer = getattr(active.optimizer, "optimizer", active.optimizer)
    if optimizer.state:
        return []
    number = MOMENTS[active.phase.config.optimizer]
    return [torch.empty_like(parameter) for parameter in active.parameters for _ in range(number)]


def _eager(module: nn.Module) -> AbstractContextManager[Any]:
    """A compiled network runs as written: a graph that is compiled here would be taken for the training's, without the gathering of
    statistics over ranks and without the parts between which DDP sends gradients. Eager needs no less memory."""
    # The import behind `set_stance` takes seconds of its own.
    return torch.compiler.set_stance("force_eager") if getattr(module, "_compiled_call_impl", None) is not None else nullcontext()


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on GPUs, or its libraries'. On CPUs, where a limit is set (ulimit -v), its allocator, oneDNN and C++ each have words
    of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in (*_CPU_WORDS, *_GPU_WORDS))


# ---- snapshot and restore


@contextmanager
def restored_afterwards(active: ActivePhase, runtime: Runtime) -> Iterator[None]:
    """Whatever happens inside, everything that training counts on is afterwards as it was, bit for bit. Costs a copy of all of it."""
    tensors = [*active.module.parameters(), *active.module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    optimizer: torch.optim.Optimizer = getattr(active.optimizer, "optimizer", active.optimizer)
    state = {parameter: {key: _copy(value) for key, value in values.items()} for parameter, values in optimizer.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    ema = None if active.ema is None else ({name: tensor.clone() for name, tensor in active.ema.state_tensors().items()}, active.ema.num_updates)
    scaler = runtime.accelerator.scaler
    scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
    with rng_restored(runtime.device), modes_restored(active.wrapped):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, kept):
                    tensor.copy_(value)
            for parameter in active.parameters:
                parameter.grad = None  # as in a step: `zero_grad` imports PyTorch's compiler
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, options in zip(optimizer.param_groups, groups):
                group.update(options)
            if active.ema is not None and ema is not None:
                active.ema.load(ema[0], num_updates=ema[1])
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)


@contextmanager
def rng_restored(device: torch.device) -> Iterator[None]:
    """The generators of the CPU and of this device stand where they stood."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
