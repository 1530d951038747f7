"""What PyTorch loads at the end of its import in a process with simulated GPUs (simulation.py): the operators, and stand-ins for what has no CPU's kernel."""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def load() -> None:
    """Called by PyTorch. Nothing is changed in a process that inherited the path alone."""
    if not is_simulated():
        return
    operators = ctypes.CDLL(os.path.join(os.environ["GPUSIM_BUILD"], "libsimops.so"), mode=ctypes.RTLD_GLOBAL)
    operators.simops_install()
    torch.backends.cudnn.enabled = False  # PyTorch would ask for its norms by name
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    for name, function in _SYNC_BATCH_NORM.items():
        _library.impl(name, function, "CUDA", allow_override=True)
    sys.meta_path.insert(0, _AfterImport("torchcodec.decoders", _decode_on_host))


def is_simulated() -> bool:
    return hasattr(ctypes.CDLL(None), "simcuda_contexts")


def contexts() -> list[int]:
    """The devices on which this process has a context: each takes about half a GiB of a real one."""
    mask = ctypes.CDLL(None).simcuda_contexts
    mask.restype = ctypes.c_ulong
    return [device for device in range(64) if mask() >> device & 1]


def num_waits() -> int:
    """How often this thread has waited for a device."""
    waits = ctypes.CDLL(None).simcuda_waits
    waits.restype = ctypes.c_uint64
    return int(waits())


def num_operators() -> int:
    """How many operators this process has computed on simulated devices."""
    calls = ctypes.CDLL(os.path.join(os.environ["GPUSIM_BUILD"], "libsimops.so")).simops_calls
    calls.restype = ctypes.c_uint64
    return int(calls())


# ---- synchronised batch norm: its kernels are for GPUs only; the same sums by other operators

_library = torch.library.Library("aten", "IMPL")


def _reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _like(y: Tensor, x: Tensor) -> Tensor:
    y = y.to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else y


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.float()
    return x.mean(_reduced(x)), (x.var(_reduced(x), unbiased=False) + eps).rsqrt()


def _gather_stats(
    x: Tensor, mean: Tensor, invstd: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, counts: Tensor
) -> tuple[Tensor, Tensor]:
    count = counts.to(mean.dtype).view(-1, 1)
    total = count.sum()
    joint = (mean * count).sum(0) / total
    var = ((1 / invstd**2 - eps + mean**2) * count).sum(0) / total - joint**2
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(joint.to(running_mean.dtype), alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_((var * total / (total - 1)).to(running_var.dtype), alpha=momentum)
    return joint, (var + eps).rsqrt()


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    y = (x.float() - _per_channel(mean, x)) * _per_channel(invstd, x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return _like(y, x)


def _backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, input_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x = grad.float(), x.float()
    sum_grad, sum_grad_x = grad.sum(_reduced(x)), (grad * (x - _per_channel(mean, x))).sum(_reduced(x))
    return sum_grad, sum_grad_x, sum_grad_x * invstd, sum_grad.clone()


def _backward(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sum_grad: Tensor, sum_grad_x: Tensor, counts: Tensor) -> Tensor:
    total = counts.sum().to(mean.dtype)
    centred = x.float() - _per_channel(mean, x)
    y = grad.float() - _per_channel(sum_grad / total, x) - centred * _per_channel(invstd**2 * sum_grad_x / total, x)
    return _like(y * _per_channel(invstd if weight is None else invstd * weight, x), x)


_SYNC_BATCH_NORM: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _apply,
    "batch_norm_backward_reduce": _backward_sums,
    "batch_norm_backward_elemt": _backward,
}


# ---- nvJPEG: decoded by the CPU's decoder, onto the current stream of the device


def _decode_on_host(decoders: ModuleType) -> None:
    real = decoders.decode_jpeg

    def decode_jpeg(images: Any, *args: Any, device: Any = "cpu", **more: Any) -> Any:
        pictures = real(images, *args, device="cpu", **more)
        return pictures if torch.device(device).type == "cpu" else [picture.to(device) for picture in pictures]

    decoders.decode_jpeg = decode_jpeg  # type: ignore[attr-defined]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `change` with the module of this name once it is imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == self.name else None
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
