"""How much of the source must be used, and what of it does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import net, right, state
from torch import nn

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.plan import plan_transfer
from dtl.errors import TransferRefused, UserError


def extra(prefix: str, layers: int) -> dict[str, torch.Tensor]:
    """Convolutions of another network."""
    return {f"{prefix}.{n}.weight": torch.empty(5, 5, 3, 3, device="meta") for n in range(layers)}


@pytest.mark.parametrize("by", ["name", "auto"])
def test_a_deeper_network_of_the_same_names_is_refused(by: Any) -> None:
    """Every layer of the target has a namesake of its shape, as ResNet-50 has in ResNet-101; more than half of the source is left."""
    source, target = state(net((5, 6))), net((2, 2), classes=3)
    plan = plan_transfer(source, target, by=by)
    assert plan.pairs == {}
    assert plan.coverage == 1.0
    assert plan.source_coverage == pytest.approx(10 / 24)
    assert plan.refusals[0].startswith("coverage 42% of the source's convolution and linear layers is below min_coverage 60%")
    assert "layer1.2.conv1 [8, 8, 3, 3]" in plan.refusals[0]
    assert plan.refusals[0].endswith("To load it anyway, set min_coverage: 0.41")
    accepted = plan_transfer(source, target, by=by, min_coverage=0.41)
    assert accepted.ok
    right(accepted)


def test_parts_beside_the_network_are_set_aside_by_name() -> None:
    source = {**state(net()), **extra("decoder", 20), **extra("aux", 3)}
    plan = plan_transfer(source, net())
    assert plan.refusals[0].endswith("To load it anyway, set ignore: ['decoder.*', 'aux.*']")
    for ignore in (["decoder.*", "aux.*"], ["decoder.*"]):
        plan = plan_transfer(source, net(), ignore=ignore)
        assert plan.ok
        right(plan)
        assert sum(o.reason == "left out (ignore)" for o in plan.outcomes) == (23 if len(ignore) == 2 else 20)
    with pytest.raises(UserError, match=r"ignore: decode\.\* matches no tensor of the source \(its names look like conv1.weight"):
        plan_transfer(source, net(), ignore=["decode.*"])


def test_what_is_ignored_is_not_used_even_where_it_fits() -> None:
    plan = plan_transfer(state(net()), net(), ignore=["layer2.1.*"], min_coverage=0.5)
    assert all(not str(source).startswith("layer2.1.") for source in plan.pairs.values())
    assert {name for name in plan.fresh if name.startswith("layer2.1.conv")} == {"layer2.1.conv1.weight", "layer2.1.conv2.weight"}


def test_a_detector_gives_its_backbone() -> None:
    """The prefix that is found says which part of the file is spoken of: the neck is another part, and does not count."""
    source = {**state(net(), "backbone.{}".format), **extra("neck", 30), **extra("roi_head", 10)}
    plan = plan_transfer(source, net())
    assert plan.ok
    right(plan, "backbone.{}".format)
    assert plan.source_coverage == 1.0
    assert {o.reason for o in plan.outcomes if o.outcome == "unused"} == {"outside of the prefix"}


@pytest.mark.parametrize("by", ["auto", "map"])
def test_a_chosen_prefix_bounds_what_counts(by: Any) -> None:
    source = state(net(), "encoder_q.{}".format) | state(net(), "encoder_k.{}".format) | extra("queue", 4)
    plan = plan_transfer(source, net(), by=by, prefix="encoder_q.", mapping={"*": "encoder_q.*"} if by == "map" else None)
    assert plan.ok, plan.refusals
    assert plan.source_coverage == 1.0


def test_a_network_in_the_source_that_is_deeper_under_its_prefix_is_refused_too() -> None:
    plan = plan_transfer(state(net((5, 6)), "backbone.{}".format), net((2, 2)))
    assert "of the source's convolution" in plan.refusals[0]


def test_the_network_is_left_alone_and_the_report_tells_both_shares() -> None:
    class Small(nn.Sequential):
        def __init__(self, depth: int) -> None:
            super().__init__(*[nn.Conv2d(3, 3, 1) for _ in range(depth)])

    target = Small(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(TransferRefused, match=r"refused: coverage 40% of the source's .*ignore: \['2.\*', '3.\*', '4.\*'\]"):
        load_pretrained(target, Small(5).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    report = load_pretrained(target, Small(5).state_dict(), min_coverage=0.4)
    assert report.coverage == 1.0
    assert "40.0% of the source's layers used" in str(report)
    assert report.to_dict()["source_coverage"] == 0.4


def test_the_source_head_and_a_few_spare_layers_do_not_count() -> None:
    source = {**state(net(classes=1000)), **extra("projector", 3)}
    assert plan_transfer(source, net(classes=3)).ok
