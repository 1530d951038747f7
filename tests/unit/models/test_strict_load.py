"""A state dict is loaded whole or not at all, and the refusal names what differs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dtl.errors import UserError
from dtl.models.strict_load import all_finite, first_not_finite, strict_load


def _module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_the_tensors_become_the_modules() -> None:
    module, source = _module(), _module()
    strict_load(module, source.state_dict(), "a file")
    for name, tensor in source.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "missing: 0.bias"),
        ({"fc.weight": torch.zeros(1)}, "unexpected: fc.weight"),
        ({"0.weight": torch.zeros(2, 4)}, "wrong shape: 0.weight has shape (2, 4) instead of (2, 3)"),
        (
            {"0.bias": None, "a": torch.zeros(2), "1.weight": torch.zeros(())},
            "missing: 0.bias; unexpected: a; wrong shape: 1.weight has shape () instead of (2,)",
        ),
        (dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean")), "missing: 0.weight, 0.bias, 1.weight and 2 more"),
    ],
)
def test_what_differs_is_named_in_one_line_and_nothing_is_loaded(change: dict[str, torch.Tensor | None], message: str) -> None:
    module = _module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {name: tensor for name, tensor in {**_module().state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(UserError) as refusal:
        strict_load(module, tensors, "runs/first/model/model.safetensors")
    assert str(refusal.value) == f"runs/first/model/model.safetensors does not match this network: {message}"
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("name", "value"), [("0.weight", math.nan), ("0.bias", math.inf), ("1.running_var", math.inf), ("1.running_mean", math.nan)])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    tensors = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    tensors[name].view(-1)[0] = value
    with pytest.raises(UserError, match=rf"checkpoints/step-3: the tensor {name} holds values that are not finite"):
        strict_load(module, tensors, "checkpoints/step-3")


def test_masks_may_hold_infinities_and_sums_may_overflow() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), -math.inf))
    strict_load(module, {"weight": torch.full((2, 2), 3e38), "bias": torch.zeros(2), "mask": module.mask.clone()}, "here")  # type: ignore[operator]
    assert not all_finite(torch.tensor([1.0, math.inf]))
    assert all_finite(torch.tensor([3e38, 3e38]))
    assert all_finite(torch.tensor([1, 2]))
    big, counted = torch.full((2,), 3e38), torch.tensor([1, 2])
    assert first_not_finite({}) is None
    assert first_not_finite({"big": big, "counted": counted, "half": torch.full((2,), 6e4, dtype=torch.half)}) is None
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf, -math.inf]), torch.tensor([complex(0, math.inf)])):
        assert first_not_finite({"big": big, "counted": counted, "bad": bad}) == "bad"
