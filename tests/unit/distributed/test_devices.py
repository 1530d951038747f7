"""Kinds of devices: what is not used is refused by its name, and no GPU becomes the CPU without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtl.config import load_config
from dtl.distributed import devices
from dtl.distributed.devices import gpu_expected, uses_gpu
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "dtl has not been tried on mps and does not use it; use cuda (NVIDIA GPUs, and AMD's with ROCm) or cpu"),
        ("XPU:0", "dtl has not been tried on xpu and does not use it"),
        ("rocm", "PyTorch's name for rocm is cuda"),
        ("cuda:1", "use cuda, and CUDA_VISIBLE_DEVICES=1 to choose a GPU"),
    ],
)
def test_a_kind_that_is_not_used_is_refused_by_its_name(device: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(["--run.device", device])
    assert str(refused.value).startswith("--run.device: run.device: ")
    assert message in str(refused.value)
    with pytest.raises(UserError) as refused:  # Python's functions take a device too
        Runtime(device=device)
    assert message in str(refused.value)


def test_no_other_word_becomes_the_cpu() -> None:
    with pytest.raises(UserError, match="the device: must be auto, cpu or cuda, got 'gpu'"):
        uses_gpu("gpu")
    assert not uses_gpu("cpu")


def test_a_gpu_that_pytorch_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert gpu_expected({}) is None
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert gpu_expected({}) == (
        "warning: this machine has 2 NVIDIA GPUs, but PyTorch sees none: the CPU is used (`dtl doctor` says why; --run.device cpu says it is meant)"
    )
    assert gpu_expected({"CUDA_VISIBLE_DEVICES": ""}) is None, "whoever hides them means it"
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "nothing")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="mps"))
    assert gpu_expected({}) == "warning: dtl has not been tried on mps, which PyTorch finds here: the CPU is used (--run.device cpu says it is meant)"
