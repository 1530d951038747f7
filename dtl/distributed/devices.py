"""The one place that knows kinds of devices: which are used, which are refused by name, and what is printed where the CPU takes a GPU's place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dtl.config.models import check_device
from dtl.distributed.launch import Launch, gpus_of_slurm, read_launch
from dtl.errors import UserError
from dtl.text import counted

_DRIVER = Path("/proc/driver/nvidia/gpus")


def uses_gpu(device: str, launch: Launch | None = None) -> bool:
    """Whether `run.device` comes to a GPU on this machine: NVIDIA's, or AMD's with a ROCm build of PyTorch. Starts nothing on it. UserError if it cannot."""
    try:
        if check_device(device) not in ("auto", "cpu", "cuda"):
            raise ValueError(f"must be auto, cpu or cuda, got {device!r}")
    except ValueError as error:
        raise UserError(f"the device: {error}") from None
    use_cpu = (launch or read_launch()).use_cpu
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but PyTorch finds no GPU on this machine; use --run.device auto or cpu")
    if device == "cuda" and use_cpu:
        raise UserError("run.device is cuda, but the launch configuration asks for CPUs (use_cpu or ACCELERATE_USE_CPU); launch with launch/gpus.yaml")
    gpu = device == "cuda" or (device == "auto" and not use_cpu and torch.cuda.is_available())
    if device == "auto" and not gpu and not use_cpu:
        check_slurm_gpus(os.environ)
    return gpu


def check_slurm_gpus(environment: Mapping[str, str]) -> None:
    """UserError where Slurm gave this job GPUs: to train on the CPU in silence costs a night."""
    given = gpus_of_slurm(environment)
    if given is None:
        return
    why = f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']!r} hides them" if _hidden(environment) else "`dtl doctor` says why"
    if not torch.version.cuda:
        why = f"this torch {torch.__version__} is built for CPUs only"
    raise UserError(f"Slurm gave this job GPUs ({given}), but PyTorch sees none: {why}; to train on the CPU all the same use device cpu")


def gpu_expected(environment: Mapping[str, str]) -> str | None:
    """A warning where `auto` takes the CPU although there is a GPU, or NVIDIA's container variables speak of one. Images set these too on machines without
    one, and what PyTorch calls an accelerator may be one that dtl does not use: no reason to refuse."""
    value = environment.get("NVIDIA_VISIBLE_DEVICES", "").strip()
    other = torch.accelerator.current_accelerator()
    try:
        there = len(list(_DRIVER.iterdir()))
    except OSError:
        there = 0
    if value not in ("", "void", "none"):
        what = f"NVIDIA_VISIBLE_DEVICES={value}, but PyTorch sees no GPU"
    elif there and not _hidden(environment):
        what = f"this machine has {counted(there, 'NVIDIA GPU')}, but PyTorch sees none"
    elif other is not None and other.type not in ("cuda", "cpu"):
        return f"warning: dtl has not been tried on {other.type}, which PyTorch finds here: the CPU is used (--run.device cpu says it is meant)"
    else:
        return None
    return f"warning: {what}: the CPU is used (`dtl doctor` says why; --run.device cpu says it is meant)"


def _hidden(environment: Mapping[str, str]) -> bool:
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    return hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles")
