"""Points between two networks: the ends are the parents bit for bit, and statistics are those of the images, however they are cut into batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dtl.models.norms import statistics_of_batch
from dtl.training.blend import SHARES, between, moved_norms, ordered_sum


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    drawn = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
    return {"weight": drawn.to(dtype), "frozen": torch.full((2,), 0.1).to(dtype), "num_batches_tracked": torch.tensor(seed)}


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_ends_are_the_parents_and_what_both_share_is_the_same_at_every_point(first: int, second: int, dtype: torch.dtype) -> None:
    start, end = weights(first, dtype), weights(second, dtype)
    assert all(between(start, end, 0.0)[name] is tensor for name, tensor in start.items())
    assert all(between(start, end, 1.0)[name] is tensor for name, tensor in end.items())
    for share in SHARES:
        made = between(start, end, share)
        assert torch.equal(made["frozen"], start["frozen"])
        assert made["num_batches_tracked"] == second
        assert made["weight"].dtype == dtype
        exact = start["weight"].double() + share * (end["weight"].double() - start["weight"].double())
        assert torch.allclose(made["weight"].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert between({"weight": start["weight"]}, end, 0.0)["frozen"] is end["frozen"], "a checkpoint holds only what the phase may change"


class TwoUses(nn.Module):
    """A norm that is used once, and one that is used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.second(self.first(images)) * 2 + 1)


def test_statistics_are_those_of_the_pass_and_nothing_else_changes() -> None:
    module, images = TwoUses().eval(), 5 + 2 * torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    module.first.num_batches_tracked += 7
    mean, variance = statistics_of_batch([module.first, module.second], partial(module, images))
    assert torch.allclose(mean[:3].float(), images.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance[:3].float(), images.var(dim=(0, 2, 3)), atol=1e-4)
    # Normalised images come to the second norm (mean 0, variance 1), and then twice these plus 1: means 0 and 1, variances 1 and 4.
    assert torch.allclose(mean[3:], torch.tensor(0.5, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(variance[3:], torch.tensor(2.5, dtype=torch.float64), rtol=1e-2)
    assert (module.first.momentum, module.second.momentum, module.first.training) == (0.1, 0.3, False)
    assert module.first.num_batches_tracked == 7


def test_only_norms_whose_statistics_differ_are_estimated() -> None:
    module = TwoUses()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert moved_norms(module, start, module.state_dict()) == []
    module.second.running_var += 1
    assert moved_norms(module, start, module.state_dict()) == ["second"]
    assert moved_norms(module, {}, module.state_dict()) == [], "frozen: a checkpoint does not hold them"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_of_zeros_change_no_bit_of_a_sum(ranks: int) -> None:
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    most = -(-len(rows) // ranks)
    spread = torch.zeros(ranks * most, 4, dtype=torch.float64)
    for rank in range(ranks):
        own = rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]
        spread[rank * most : rank * most + len(own)] = own
    assert torch.equal(ordered_sum(spread), ordered_sum(rows))
