"""What counts as out of memory."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtl.models.build import build
from dtl.training import micro_batch
from dtl.training.micro_batch import _is_out_of_memory, _room, fit


@pytest.mark.parametrize(
    ("error", "it_is"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN under `ulimit -v`, as seen with torch 2.14
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_what_counts_as_out_of_memory_on_a_cpu(error: BaseException, it_is: bool) -> None:
    assert _is_out_of_memory(error) == it_is


def test_a_gpu_keeps_room_of_what_this_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80_000))
    assert _room(torch.device("cuda", 1)) == 2_000
    assert _room(torch.device("cpu")) == 0


@pytest.mark.parametrize(("fits", "taken"), [(8, 4), (3, 2), (1, 1)])
def test_what_only_just_fits_is_halved_unless_it_is_one_image(monkeypatch: pytest.MonkeyPatch, fits: int, taken: int) -> None:
    """A device with memory for exactly `fits` images of 100 bytes, and room for one of them to keep."""
    kept: list[torch.Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(micro_batch, "_room", lambda device: 100)
    monkeypatch.setattr(torch, "empty", lambda *size, **more: kept.append(made := empty(*size, **more)) or made)  # type: ignore[func-returns-value]
    refs: list[Any] = []

    def compute(active: Any, size: int, *_: Any) -> None:
        refs.extend(weakref.ref(tensor) for tensor in kept)
        room = sum(tensor.numel() for tensor in kept)
        kept.clear()
        if 100 * size + room > 100 * fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(micro_batch, "_compute", compute)
    loaders: Any = SimpleNamespace(micro_batch_size=8, image_size=8, global_batch_size=8)
    loaders.layout = lambda phase: SimpleNamespace(micro_batch_size=loaders.micro_batch_size, unit=1, accumulation_steps=8 // loaders.micro_batch_size)
    active: Any = SimpleNamespace(phase=SimpleNamespace(name="all"), module=build("dtl/resnet_tiny", num_classes=3).module, parameters=[])
    runtime: Any = SimpleNamespace(gather=lambda value: [value], world_size=1, device=torch.device("cpu"))
    normalise: Any = None
    assert fit(active, loaders, runtime, normalise=normalise, state=None, log=lambda line: None)
    assert loaders.micro_batch_size == taken
    assert all(ref() is None for ref in refs), "given back"
