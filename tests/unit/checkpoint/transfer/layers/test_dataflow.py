"""In which order a network uses its layers."""

from __future__ import annotations

import torch
from small_networks import Net, net

from dtl.checkpoint.transfer.layers.dataflow import trace_dataflow


def test_dataflow_is_the_order_of_use() -> None:
    flow = trace_dataflow(net())
    assert flow is not None
    assert flow.order[0] == "conv1.weight"
    assert flow.order.index("layer2.0.shortcut.0.weight") > flow.order.index("layer2.0.bn2.weight")
    assert flow.feeds["layer2.0.bn1.weight"] == {"layer2.0.conv1.weight"}
    real = Net()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    assert trace_dataflow(real) == flow
    assert real.training
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
