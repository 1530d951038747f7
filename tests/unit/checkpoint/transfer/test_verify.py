"""Whether two networks compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transfer_networks import TwoConvolutions as Net

from dtl.checkpoint import plan_transfer
from dtl.checkpoint.transfer.verify import randomise, verify_plan


@pytest.fixture
def source() -> Net:
    model = Net()
    randomise(model)
    return model.eval()


def test_verify_finds_what_a_right_map_cannot_see(source: Net) -> None:
    twin = Net()
    plan = plan_transfer(source.state_dict(), twin)
    good = verify_plan(plan, source, twin, image_size=16)
    assert (good.compared, good.equal, good.first_divergence, good.settings) == (3, 3, None, ())
    assert good.output_difference is not None
    assert good.output_difference < 1e-6
    twin.conv2.stride = (2, 2)
    twin.conv1.padding = (0, 0)
    twin.bn1.eps = 0.5
    bad = verify_plan(plan, source, twin, image_size=16)
    assert bad.first_divergence is not None
    assert bad.first_divergence == "conv1 (in the source: conv1): the shapes of their outputs differ"
    assert "conv1: padding (0, 0) here, (1, 1) in the source (conv1)" in bad.settings
    assert any("bn1: eps 0.5 here" in line for line in bad.settings)
    assert any("conv2: stride (2, 2) here, (1, 1) in the source" in line for line in bad.settings)


def test_a_parameter_without_elements_is_no_obstacle() -> None:
    source, twin = Net(), Net()
    for network in (source, twin):
        network.unused = nn.Parameter(torch.zeros(0, 4))
    assert verify_plan(plan_transfer(source.state_dict(), twin), source, twin, image_size=16).first_divergence is None
