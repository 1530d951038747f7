"""What stays random is named, refused where loaded layers follow it, and allowed by the line that the message has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import net, state
from torch import nn

from benchmarks.transfer_cases import advice
from dtl.checkpoint import load_pretrained, plan_transfer
from dtl.checkpoint.transfer.fresh import as_patterns, loaded_behind
from dtl.checkpoint.transfer.layers.dataflow import target_of
from dtl.errors import TransferRefused, UserError


def without(source: dict[str, torch.Tensor], *beginnings: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in source.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("names", "others", "patterns"),
    [
        (["a.weight", "a.bias"], ["b.weight"], ["a.*"]),
        (["a.bias"], ["a.weight"], ["a.bias"]),
        (["token"], ["tokens"], ["token"]),
        ([f"blocks.{n}.ls.gamma" for n in range(3)], ["blocks.0.fc.weight", "blocks.1.fc.weight", "blocks.2.fc.weight"], ["blocks.*.ls.*"]),
        (["blocks.0.fc.bias", "blocks.2.fc.bias"], ["blocks.0.fc.weight", "blocks.1.fc.bias", "blocks.2.fc.weight"], ["blocks.0.fc.bias", "blocks.2.fc.bias"]),
        (["blocks.1.fc.weight", "blocks.1.fc.bias", "blocks.10.x"], ["blocks.0.fc.weight"], ["blocks.1.*", "blocks.10.*"]),
    ],
)
def test_few_patterns_and_none_that_matches_more(names: list[str], others: list[str], patterns: list[str]) -> None:
    assert as_patterns(names, [*names, *others]) == patterns


class Crossed(nn.Module):
    """Registered in another order than used; `spare` is never used, `late` sees what no loaded layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.spare, self.first, self.late = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 4), nn.Linear(4, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.late(self.second(self.first(x))))


def test_what_follows_is_a_matter_of_dataflow() -> None:
    target = target_of(Crossed())
    index = {layer.path: layer.index for layer in target.layers}
    random = [layer for layer in target.layers if layer.path in ("first", "spare", "late")]
    assert loaded_behind(target, random, {index["second"]}) == {index["first"]: index["second"]}
    registered = target_of(Crossed(), trace=False)
    assert loaded_behind(registered, random, {index["late"]}) == {index["spare"]: index["late"], index["first"]: index["late"]}


def test_a_random_layer_in_front_of_loaded_ones_needs_the_line_of_the_message() -> None:
    source, target = state(net()), net()
    plan = plan_transfer(without(source, "layer1.1.conv1"), target)
    assert not plan.ok
    assert plan.refusals[0].startswith(
        "besides the head 5 tensors would stay random, and loaded layers follow: layer1.1.conv1.*, layer1.1.bn1.* (layer1.1.conv1: "
    )
    options = advice(plan.refusals[0])
    assert options == {"fresh": ["layer1.1.conv1.*", "layer1.1.bn1.*"]}
    allowed = plan_transfer(without(source, "layer1.1.conv1"), target, **options)
    assert allowed.ok
    assert allowed.warnings[0] == "besides the head 5 tensors stay random (at initial values): layer1.1.conv1.*, layer1.1.bn1.*"
    assert allowed.warnings[1].startswith("4 tensors of the source are dropped")
    assert set(allowed.random) == {"layer1.1.conv1.weight", *(f"layer1.1.bn1.{word}" for word in ("weight", "bias", "running_mean", "running_var"))}


def test_patterns_given_before_stand_in_the_next_line() -> None:
    plan = plan_transfer(without(state(net()), "layer1.1.", "conv1"), net(), fresh=["layer1.1.*"])
    assert plan.refusals[0].endswith("set fresh: ['layer1.1.*', 'conv1.*', 'bn1.*']")


def test_behind_the_last_loaded_layer_new_layers_are_named_and_nothing_more() -> None:
    target = net()
    target.fc = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))  # type: ignore[assignment]
    plan = plan_transfer(state(net()), target, heads=["fc.2"])
    assert plan.ok
    assert plan.warnings == ("besides the head 2 tensors stay random (at initial values): fc.0.*",)


def test_fresh_decides_that_a_new_name_is_a_new_layer() -> None:
    source = {name.replace("layer2.1.conv2", "layer2.1.last"): value for name, value in state(net()).items()}
    assert "layer2.1.conv2.weight is undecided" in plan_transfer(source, net()).refusals[0]
    plan = plan_transfer(source, net(), fresh=["layer2.1.conv2.*", "layer2.1.bn2.*"])
    assert plan.ok, plan.refusals
    assert "layer2.1.conv2.weight" in plan.random
    assert "layer2.1.last.weight" in plan.dropped


def test_a_bias_that_the_source_does_not_have_is_named() -> None:
    class Two(nn.Sequential):
        def __init__(self, *, bias: bool) -> None:
            super().__init__(nn.Linear(4, 6, bias=bias), nn.Linear(6, 6, bias=bias), nn.Linear(6, 2))

    report = load_pretrained(Two(bias=True), Two(bias=False).state_dict())
    assert str(report).startswith("warning: besides the head 2 tensors stay random (at initial values): 0.bias, 1.bias\n")
    assert report.coverage == pytest.approx(2 / 3)
    assert report.to_dict()["random"] == ["0.bias", "1.bias"]
    assert report.to_dict()["warnings"] == list(report.warnings)
    report = load_pretrained(Two(bias=False), Two(bias=True).state_dict())
    assert str(report).startswith("warning: 2 tensors of the source are dropped, for which this network has no place: 0.bias, 1.bias\n")
    assert report.coverage == 1.0


def test_a_pattern_without_a_hit_and_a_refusal_that_changes_nothing() -> None:
    with pytest.raises(UserError, match=r"^fresh: conv9\.\* matches no tensor of this network \(its names look like conv1.weight, "):
        plan_transfer(state(net()), net(), fresh=["conv9.*"])
    target: Any = Crossed()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(TransferRefused, match=r"set fresh: \['first\.\*'\]"):
        load_pretrained(target, without(Crossed().state_dict(), "first"))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
