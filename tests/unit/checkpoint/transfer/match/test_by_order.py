"""Planning by order: equal sequences of shapes, else alignment with gaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import Net, hashed, net, right, state
from torch import nn

from dtl.checkpoint.transfer.plan import plan_transfer


def test_strict_order_takes_equal_sequences_whatever_the_names() -> None:
    for source, target in ((net(), net(classes=3)), (net(classes=3), net())):
        plan = plan_transfer(state(source, hashed), target, by="order")
        right(plan, hashed)
        assert plan.ok
        assert plan.view == "strict order"
        assert plan.fresh == ("fc.weight", "fc.bias")
    headless = {hashed(n): v for n, v in net().state_dict().items() if not n.startswith("fc.")}
    assert plan_transfer(headless, net(), by="order").fresh == ("fc.weight", "fc.bias")


@pytest.mark.parametrize("by", ["order", "strict"])
def test_order_is_refused_for_sorted_names(by: Any) -> None:
    plan = plan_transfer(dict(sorted(state(net()).items())), net(), by=by)
    assert plan.pairs == {}
    assert f"by: {by} needs the order" in plan.refusals[0]
    assert "safetensors keeps no order" in plan.refusals[0]


def test_strict_takes_equal_sequences_or_nothing() -> None:
    right(plan_transfer(state(net(), hashed), net(classes=3), by="strict"), hashed)
    plan = plan_transfer(state(net(), hashed), net((3, 2)), by="strict")
    assert plan.pairs == {}
    assert "the sequences of shapes differ (50 tensors in the source, 60 in the network): layer1.2.conv1.weight [8, 8, 3, 3] here" in plan.refusals[0]


def test_order_aligns_with_gaps() -> None:
    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.extra = self.bn1, nn.Conv2d(8, 8, 5, padding=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.extra(torch.relu(self.bn1(self.conv1(x))))
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    with torch.device("meta"):
        target = Deeper()
    plan = plan_transfer(state(net(), hashed), target, by="order")
    right(plan, hashed)
    assert set(plan.fresh) == {"extra.weight", "extra.bias"}
    assert plan.coverage > 0.8
