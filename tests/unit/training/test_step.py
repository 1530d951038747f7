"""A full batch's loss: without the weights the same, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtl.optim.losses import build_loss
from dtl.training.step import _weighted_sum


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}, {"name": "focal"}, {"class_weights": torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5])}])
def test_a_full_batch_needs_no_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    active: Any = SimpleNamespace(loss=build_loss(**options))
    logits, targets = torch.randn(37, 5), torch.randint(5, (37,))
    found = []
    for weights in (torch.ones(37), None):
        given = logits.clone().requires_grad_()
        total = _weighted_sum(active, given, targets, weights)
        total.backward()
        found.append((total.item(), given.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    padded = torch.cat([logits, torch.full((3, 5), float("inf"))]).requires_grad_()
    total = _weighted_sum(active, padded, torch.cat([targets, torch.zeros(3, dtype=torch.int64)]), torch.cat([torch.ones(37), torch.zeros(3)]))
    assert total.item() == pytest.approx(found[0][0], rel=1e-6)
