"""Optimizer state by names, counters as JSON, conflicts of settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dtl.checkpoint.resume.state import Best, Kept, PhaseProgress, RunResults, TrainState, config_conflicts, load_optimizer, optimizer_tensors
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.errors import UserError

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95)),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "fused adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    net.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return net.to(memory_format=torch.channels_last)


def groups(net: nn.Module, *, skip: str = "", turned: bool = False) -> list[dict[str, Any]]:
    """Weights with decay, the rest without; what one of dtl's group builders would give."""
    named = {name: p for name, p in net.named_parameters() if name != skip}
    matrix = [name for name, p in named.items() if p.dim() > 1]
    rest = [name for name, p in named.items() if p.dim() <= 1]
    found = [
        {"params": [named[name] for name in names], "names": names, "weight_decay": decay, "lr_scale": 0.5} for names, decay in ((matrix, 0.1), (rest, 0.0))
    ]
    return found[::-1] if turned else found


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(kind: str, tmp_path: Any) -> None:
    whole = network()
    train(whole, OPTIMIZERS[kind](groups(whole)), 0, 6)

    net = network()
    optimizer = OPTIMIZERS[kind](groups(net))
    train(net, optimizer, 0, 3)
    tensors, meta = optimizer_tensors(optimizer)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(3, {"model": net.state_dict(), "optimizer": tensors}, {"optimizer": meta}, wait=True)
    found = store.newest()
    assert found is not None

    again = network()
    again.load_state_dict(found.tensors("model"))
    resumed = OPTIMIZERS[kind](groups(again))
    load_optimizer(resumed, found.tensors("optimizer"), found.state["optimizer"])
    for group, other in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        for p, q in zip(group["params"], other["params"], strict=True):
            left, right = resumed.state.get(p, {}), optimizer.state.get(q, {})
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, right[key])
                    assert (value.dtype, value.device, value.stride()) == (right[key].dtype, right[key].device, right[key].stride())
                else:
                    assert value == right[key]
    train(again, resumed, 3, 6)
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_fresh_optimizer_has_no_state_and_takes_none() -> None:
    net = network()
    optimizer = OPTIMIZERS["adam"](groups(net))
    tensors, meta = optimizer_tensors(optimizer)
    assert tensors == {}
    load_optimizer(optimizer, tensors, json.loads(json.dumps(meta)))
    assert len(optimizer.state) == 0


def _saved(kind: str = "adam") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    net = network()
    optimizer = OPTIMIZERS[kind](groups(net))
    train(net, optimizer, 0, 1)
    tensors, meta = optimizer_tensors(optimizer)
    return dict(tensors), json.loads(json.dumps(meta))


def _wrong_shape(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    tensors["exp_avg/4.bias"] = torch.zeros(5)


def _unknown_name(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    tensors["exp_avg/9.bias"] = torch.zeros(5)


REFUSED: list[tuple[str, Callable[..., None] | None, dict[str, Any], str]] = [
    ("momentum", None, {}, "has the optimizer state of Adam, but the run uses SGD"),
    ("amsgrad", None, {}, "amsgrad is True, but was False"),
    ("adam", None, {"skip": "4.bias"}, r"\(1 differ, the first is 4.bias\): the checkpoint's optimizer trained it, this one does not"),
    ("adam", None, {"turned": True}, "the parameters are the same, but grouped differently"),
    ("adam", _wrong_shape, {}, r"exp_avg/4.bias has shape \[5\] in the checkpoint, but its parameter has shape \[4\]"),
    ("adam", _unknown_name, {}, "state for 9.bias, which the optimizer does not train"),
]


@pytest.mark.parametrize(("kind", "spoil", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str, spoil: Callable[..., None] | None, options: dict[str, Any], message: str) -> None:
    tensors, meta = _saved()
    if spoil:
        spoil(tensors, meta)
    net = network()
    optimizer = OPTIMIZERS[kind](groups(net, **options))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match=message):
        load_optimizer(optimizer, tensors, meta)
    assert optimizer.state_dict() == before


def test_a_parameter_that_was_not_trained_is_named() -> None:
    net = network()
    optimizer = OPTIMIZERS["adam"](groups(net, skip="4.weight"))
    tensors, meta = optimizer_tensors(optimizer)
    with pytest.raises(UserError, match=r"the first is 4.weight\): the checkpoint's optimizer did not train it"):
        load_optimizer(OPTIMIZERS["adam"](groups(net)), tensors, meta)


def test_groups_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="must carry `names`"):
        optimizer_tensors(torch.optim.SGD(network().parameters(), lr=0.1))


def test_the_scaler_is_plain_json() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14 / 3)
    scaler.scale(torch.ones(()))
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    other.scale(torch.ones(()))
    assert other.state_dict() == scaler.state_dict()


def test_train_state_comes_back_through_json() -> None:
    state = TrainState(
        step=7,
        phase=PhaseProgress("all", 1, 3, kept=Kept(2, 0, 0.5, {"top1": 0.25, "loss": 1.5}), train_seconds=0.1 + 0.2, micro_batch_size=4),
        epoch=2,
        epoch_step=1,
        results=RunResults([{"phase": "head", "val": None}], {"head": Best("top1", 0.1 + 0.2, 4)}, {"head": 1.5}),
        wandb_id="abc",
        dataset_ids={"train": "x"},
        bad_samples=[{"key": "000001", "reason": "crc"}],
    )
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert TrainState.from_json(TrainState().to_json()) == TrainState()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "newer dtl \\(checkpoint format 99, this dtl reads 3\\): update dtl"),
        (
            {"format": 1},
            "older dtl \\(checkpoint format 1, this dtl reads 3\\): use the dtl version that started the run, or .*--run.name NEW.*--run.resume never",
        ),
        ({"format": None}, "no format number"),
        ({"colour": 1}, "colour unknown or missing"),
    ],
)
def test_a_state_of_another_kind_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainState.from_json(TrainState().to_json() | change)
    value = TrainState().to_json()
    del value["epoch"]
    with pytest.raises(UserError, match="epoch unknown or missing"):
        TrainState.from_json(value)
    value = TrainState().to_json()
    value["phase"]["colour"] = value["results"].pop("best")
    with pytest.raises(UserError, match="colour unknown or missing"):
        TrainState.from_json(value)


def test_a_phase_begins_with_nothing_of_the_one_before() -> None:
    assert {name for name, value in vars(PhaseProgress()).items() if value} == set()


def test_conflicts_are_named_by_dotted_keys() -> None:
    old = {"run": {"seed": 0}, "data": {"workers": 2, "mean": [1, 2]}, "phases": {"head": {"lr": 0.1, "mix": None}, "all": {"lr": 1}}}
    new = copy.deepcopy(old)
    new["data"]["mean"] = (1, 2)
    assert config_conflicts(old, new) == []
    new["data"]["workers"] = 4
    new["phases"]["head"]["lr"] = 0.2
    new["phases"]["top"] = {"lr": 3}
    assert config_conflicts(old, new) == [("data.workers", 2, 4), ("phases.head.lr", 0.1, 0.2), ("phases.top.lr", None, 3)]
    assert config_conflicts(old, new, ignored=("data.workers", "phases.*")) == []
    assert config_conflicts({"a": {}}, {}) == []


def test_the_order_of_phases_is_part_of_the_settings() -> None:
    old = {"phases": {"head": {"lr": 1}, "all": {"lr": 2}}, "data": {"a": 1, "b": 2}}
    new = {"phases": {"all": {"lr": 2}, "head": {"lr": 1}}, "data": {"b": 2, "a": 1}}
    assert config_conflicts(old, new) == [("phases", ["head", "all"], ["all", "head"])]
