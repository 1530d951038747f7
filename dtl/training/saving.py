"""A run's state on its way to a checkpoint and back: weights, optimizer, moving average, scaler, counters, best weights so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtl.checkpoint.resume.state import TrainState, load_optimizer, optimizer_tensors
from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
from dtl.data.transforms.transforms import VERSIONS
from dtl.distributed.runtime import Runtime
from dtl.models.strict_load import strict_load
from dtl.training.active import ActivePhase


def sync_buffers(active: ActivePhase, runtime: Runtime) -> None:
    """All ranks get the main process's normalisation statistics: what is evaluated, saved and handed on is one network."""
    tensors = list(active.module.buffers())
    if active.ema is not None:
        tensors += active.ema.buffers()
    runtime.sync_tensors(tensors)


def save(
    store: CheckpointStore,
    state: TrainState,
    active: ActivePhase,
    runtime: Runtime,
    *,
    best: dict[str, Tensor],
    config: dict[str, Any],
    wait: bool,
) -> float:
    """Write a checkpoint (main process); returns the seconds that the loop stood still. Buffers must be in sync."""
    if not runtime.is_main:
        return 0.0
    tensors, optimizer = optimizer_tensors(active.optimizer)
    groups: dict[str, dict[str, Tensor]] = {"model": dict(active.module.state_dict()), "optimizer": tensors}
    if active.ema is not None:
        groups["ema"] = active.ema.state_tensors()
    if best:
        groups["best"] = best
    scaler = runtime.accelerator.scaler
    extra = {
        "train": state.to_json(),
        "optimizer": optimizer,
        "scaler": None if scaler is None else scaler.state_dict(),
        "ema_updates": None if active.ema is None else active.ema.num_updates,
        "config": config,
        "precision": runtime.precision,
        "device": runtime.device.type,
        "transforms": VERSIONS,
    }
    return store.save(state.step, groups, extra, wait=wait)


def restore_model(active_module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The checkpoint's weights into the network, strictly."""
    strict_load(active_module, checkpoint.tensors("model"), str(checkpoint.path))


def restore_phase(active: ActivePhase, checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Optimizer, moving average and scaler of the phase that the checkpoint was written in."""
    load_optimizer(active.optimizer.optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])  # type: ignore[attr-defined]
    if active.ema is not None:
        active.ema.load(checkpoint.tensors("ema"), num_updates=int(checkpoint.state["ema_updates"]))
    if runtime.accelerator.scaler is not None and checkpoint.state["scaler"] is not None:
        runtime.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])


def copy_to_host(module: torch.nn.Module, into: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the state dict in host memory, in the buffers of an earlier copy where they fit."""
    copied = {}
    for name, tensor in module.state_dict().items():
        old = into.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty_like(tensor, device="cpu")
        copied[name] = old.copy_(tensor)
    return copied


Say = Callable[[str], None]
