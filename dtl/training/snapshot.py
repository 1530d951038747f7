"""A stretch of trial computing that leaves no trace: weights, statistics, optimizer, scaler and random generators are put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtl.distributed.runtime import Runtime
from dtl.training.active import ActivePhase


@contextmanager
def undone(active: ActivePhase, runtime: Runtime) -> Iterator[None]:
    """Whatever happens inside, everything that training counts on is afterwards as it was, bit for bit. Costs a copy of all of it."""
    tensors = [*active.module.parameters(), *active.module.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    optimizer: torch.optim.Optimizer = getattr(active.optimizer, "optimizer", active.optimizer)
    state = {parameter: {key: _copy(value) for key, value in values.items()} for parameter, values in optimizer.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    ema = None if active.ema is None else ({name: tensor.clone() for name, tensor in active.ema.state_tensors().items()}, active.ema.num_updates)
    scaler = runtime.accelerator.scaler
    scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
    with rng_kept(runtime.device), modes_kept(active.wrapped):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, kept):
                    tensor.copy_(value)
            active.optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, options in zip(optimizer.param_groups, groups):
                group.update(options)
            if active.ema is not None and ema is not None:
                active.ema.load(ema[0], num_updates=ema[1])
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """The generators of the CPU and of this device stand where they stood."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
