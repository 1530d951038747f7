"""The forward pass of everything that does not train."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.build import build
from dtl.training.evaluate import ForwardPass, ordered_sum
from dtl.training.phases import task_named


def test_rows_are_the_images_as_the_task_makes_them() -> None:
    network = build("dtl/resnet18_plain", num_classes=4)
    forward = ForwardPass.of(network, Runtime.alone("cpu"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 3, 32, 32), dtype=np.uint8))
    batch = Batch(images, torch.tensor([3, 1]), torch.tensor([1.0, 0.0]), torch.tensor([7, 7]), torch.tensor([0, -1]), epoch=0, step=0)
    (plain,) = forward.over([batch], task_named("classify"))
    assert plain.labels.tolist() == [3, 1]
    torch.testing.assert_close(plain.logits, forward(images))
    (turned,) = forward.over([batch], task_named("rotate"))
    assert turned.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert turned.weights.tolist() == [1.0, 0.0] * 4
    torch.testing.assert_close(turned.logits[2:4], forward(torch.rot90(images, 1, dims=(2, 3))), rtol=1e-4, atol=1e-4)
    assert not turned.logits.requires_grad
    assert not network.module.training


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_of_zeros_change_no_bit_of_a_sum(ranks: int) -> None:
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    most = -(-len(rows) // ranks)
    spread = torch.zeros(ranks * most, 4, dtype=torch.float64)
    for rank in range(ranks):
        own = rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]
        spread[rank * most : rank * most + len(own)] = own
    assert torch.equal(ordered_sum(spread), ordered_sum(rows))
