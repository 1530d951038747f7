"""Logits out of whatever a network returns, and the memory format that fits it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtl.models.network import eval_mode, forward_logits, num_outputs, to_device


class _Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output


def test_logits_of_a_tensor_a_dict_and_a_tuple_with_auxiliary_heads() -> None:
    logits, auxiliary = torch.randn(2, 3), torch.randn(2, 3)
    images = torch.zeros(2, 3, 4, 4)
    for output, expected in [(logits, []), ({"logits": logits, "features": auxiliary}, []), ((logits, auxiliary, None), [auxiliary])]:
        main, others = forward_logits(_Returns(output), images)
        assert main is logits
        assert len(others) == len(expected)
        assert all(found is other for found, other in zip(others, expected, strict=True))


@pytest.mark.parametrize(("wanted", "expected"), [("auto", True), (True, True), (False, False)])
def test_a_network_with_convolutions_is_channels_last_unless_asked_otherwise(wanted: Any, expected: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert to_device(module, torch.device("cpu"), channels_last=wanted) is expected
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last) is expected


def test_a_network_without_convolutions_stays_contiguous() -> None:
    assert to_device(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.device("cpu")) is False


def test_outputs_of_either_kind_of_head() -> None:
    assert num_outputs(nn.Linear(5, 7)) == 7
    assert num_outputs(nn.Conv2d(5, 9, 1)) == 9


def test_eval_mode_gives_each_part_its_own_mode_again() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    module[1].eval()  # a frozen part
    with eval_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module] == [True, False]
