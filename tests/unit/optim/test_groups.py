"""Parameter groups: each trainable parameter once, with the learning rate and the weight decay that it should have."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from dtl.errors import UserError
from dtl.optim.groups import build_groups, build_optimizer, undecayed_names


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))


LAYERS = [["0.weight", "0.bias", "1.weight", "1.bias"], ["2.weight", "2.bias", "3.weight", "3.bias"], ["5.weight", "5.bias"]]
NAMES = [name for layer in LAYERS for name in layer]


def test_every_trainable_parameter_once() -> None:
    module = _network()
    by_name = dict(module.named_parameters())
    for train, decay, layer_decay, norms in product((NAMES, NAMES[4:], LAYERS[2], ["1.bias"]), (0.0, 0.1), (1.0, 0.5), (False, True)):
        groups = build_groups(module, frozenset(train), layer_groups=LAYERS, weight_decay=decay, layer_decay=layer_decay, decay_norms_and_biases=norms)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(train)
        assert all(group["params"] for group in groups)
        for group in groups:
            assert [id(parameter) for parameter in group["params"]] == [id(by_name[name]) for name in group["names"]]


def test_scales_and_decay() -> None:
    groups = build_groups(_network(), NAMES, layer_groups=LAYERS, weight_decay=0.1, layer_decay=0.5, head_lr_scale=10)
    assert [(group["names"], group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (["0.weight"], 0.25, 0.1),
        (["0.bias", "1.weight", "1.bias"], 0.25, 0.0),
        (["2.weight"], 0.5, 0.1),
        (["2.bias", "3.weight", "3.bias"], 0.5, 0.0),
        (["5.weight"], 10, 0.1),
        (["5.bias"], 10, 0.0),
    ]
    (alike,) = build_groups(_network(), NAMES, layer_groups=LAYERS, weight_decay=0.1, decay_norms_and_biases=True)
    assert (alike["names"], alike["lr_scale"], alike["weight_decay"]) == (list(NAMES), 1.0, 0.1)
    flat = build_groups(_network(), NAMES, layer_groups=LAYERS, weight_decay=0.1, decay_norms_and_biases=True, head_lr_scale=2)
    assert [(group["names"], group["lr_scale"], group["weight_decay"]) for group in flat] == [
        ([name for name in NAMES if not name.startswith("5.")], 1.0, 0.1),
        (["5.weight", "5.bias"], 2, 0.1),
    ]


def test_what_weight_decay_spares() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 9, 8))
            self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
            self.listed = nn.Linear(2, 2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.to_one = nn.Conv2d(8, 1, 1)

        def no_weight_decay(self) -> set[str]:
            return {"listed.weight"}

    decayed = {name for name, _ in Odd().named_parameters()} - undecayed_names(Odd())
    assert decayed == {"attention.in_proj_weight", "attention.out_proj.weight", "to_one.weight"}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_step_like_plain_torch(name: str) -> None:
    """Scaled groups and fused kernels do what one plain optimizer a group would do."""
    torch.manual_seed(0)
    module = _network()
    groups = build_groups(module, NAMES, layer_groups=LAYERS, weight_decay=0.1, layer_decay=0.5)
    optimizer = build_optimizer(groups, name, lr=0.01)
    assert optimizer.defaults["fused"] is True
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * group["lr_scale"] for group in groups]
    torch.manual_seed(0)
    other = _network()
    parameters = dict(other.named_parameters())
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    more = {"momentum": 0.9} if name == "sgd" else {}
    plain = [kind([parameters[n] for n in g["names"]], lr=0.01 * g["lr_scale"], weight_decay=g["weight_decay"], **more) for g in groups]
    for _ in range(3):
        # The very same gradients: that of a bias before a norm is rounding noise, which Adam would blow up to full steps.
        for mine, theirs in zip(module.parameters(), other.parameters()):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        for one in plain:
            one.step()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, parameters[key], rtol=1e-5, atol=1e-7)


def test_the_state_survives_a_round_trip() -> None:
    module = _network()
    groups = build_groups(module, NAMES, layer_groups=LAYERS, weight_decay=0.1)
    optimizer = build_optimizer(groups, "adamw", lr=0.01)
    module(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    again = build_optimizer(groups, "adamw", lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert [group["names"] for group in again.param_groups] == [group["names"] for group in groups]
    assert len(again.state) == len(NAMES)


def test_mistakes_are_told() -> None:
    module = _network()
    groups = build_groups(module, NAMES, layer_groups=LAYERS)
    for arguments, message in [
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]"),
        ({"head_lr_scale": 0.0}, "head_lr_scale must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ]:
        with pytest.raises(UserError, match=message):
            build_groups(module, NAMES, layer_groups=LAYERS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no parameter is left to train"):
        build_groups(module, [], layer_groups=LAYERS)
    with pytest.raises(UserError, match="must be sgd, adam or adamw, not 'lion'"):
        build_optimizer(groups, "lion", lr=0.1)
    with pytest.raises(UserError, match="nesterov needs momentum above 0"):
        build_optimizer(groups, "sgd", lr=0.1, momentum=0.0, nesterov=True)


def test_fused_is_refused_or_left_out_with_words(caplog: pytest.LogCaptureFixture) -> None:
    module = _network().to("meta")
    groups = build_groups(module, NAMES, layer_groups=LAYERS)
    with pytest.raises(UserError, match="fused=true is not possible: no fused kernel for the device meta"):
        build_optimizer(groups, "sgd", lr=0.1, fused=True)
    with caplog.at_level("INFO", logger="dtl"):
        optimizer = build_optimizer(groups, "sgd", lr=0.1)
    assert optimizer.defaults["fused"] is False
    assert "fused kernels not used: no fused kernel for the device meta" in caplog.text


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_momentum_begins_as_the_plain_one_does(nesterov: bool) -> None:
    """An overflow in fp16's first step is left out by the kernel itself, which then used memory that nobody had written."""
    found: dict[bool, list[torch.Tensor]] = {}
    for fused in (False, True):
        torch.manual_seed(0)
        module = _network()
        optimizer = build_optimizer(build_groups(module, NAMES, layer_groups=LAYERS), "sgd", lr=0.1, nesterov=nesterov, fused=fused)
        for step in range(4):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf if step == 0 else step)
            if fused:
                # What GradScaler does with an optimizer whose kernel looks for the overflow by itself.
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(step == 0))  # type: ignore[attr-defined]
            if fused or step > 0:
                optimizer.step()
            if step == 0:
                before = [parameter.detach().clone() for parameter in module.parameters()]
                assert all(state["momentum_buffer"].eq(0).all() for state in optimizer.state.values())
                assert len(optimizer.state) == (len(before) if fused else 0)
        found[fused] = [parameter.detach() for parameter in module.parameters()]
    for plain, quick in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(quick, plain)
