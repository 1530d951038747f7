"""dtl.training.active: the recurrence, what it leaves alone, resuming, and swapping that always ends."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dtl.errors import UserError
from dtl.models.norms import norms_alone, plain_norms, synchronise_norms
from dtl.training.active import ExponentialMovingAverage, between
from dtl.training.loop import BLENDS


def _module() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 3), nn.BatchNorm1d(3))
    module.register_buffer("offset", torch.tensor([1.0, float("-inf")]))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    module[0].requires_grad_(False)
    return module


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    module(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()
    optimizer.step()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_recurrence_is_the_formula(warm_up: bool) -> None:
    module = _module()
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.5)
    ema = ExponentialMovingAverage(module, decay=0.9, warm_up=warm_up)
    expected = {name: tensor.double() for name, tensor in _state(module).items()}
    for step in range(12):
        _step(module, optimizer, step)
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step)) if warm_up else 0.9
        now = module.state_dict()
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * now[name].double()
    assert ema.num_updates == 12
    kept = ema.state_tensors()
    assert set(kept) == {name for name in module.state_dict() if not name.startswith("0.")}
    for name, tensor in kept.items():
        if tensor.is_floating_point() and name != "offset":
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(tensor, module.state_dict()[name]), "other buffers are copied"


def test_frozen_parameters_and_still_statistics_stay_bit_identical() -> None:
    module = _module()
    module[1].eval()
    before = _state(module)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.5)
    ema = ExponentialMovingAverage(module, decay=0.99)
    for step in range(20):
        _step(module, optimizer, step)
        ema.update()
    ema.copy_to(module)
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var", "offset"):
        assert torch.equal(module.state_dict()[name], before[name]), name
    assert not torch.equal(module.state_dict()["3.weight"], before["3.weight"])


def test_swapped_gives_the_average_and_always_gives_back() -> None:
    module = _module()
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.5)
    ema = ExponentialMovingAverage(module, decay=0.5)
    _step(module, optimizer, 0)
    ema.update()
    _step(module, optimizer, 1)
    own, average = _state(module), {name: tensor.clone() for name, tensor in ema.state_tensors().items()}
    pointers = [p.data_ptr() for p in module.parameters()]
    with ema.swapped(module):
        for name, tensor in average.items():
            assert torch.equal(module.state_dict()[name], tensor)
    with pytest.raises(KeyboardInterrupt), ema.swapped(module):
        raise KeyboardInterrupt
    for name, tensor in own.items():
        assert torch.equal(module.state_dict()[name], tensor), name
    for name, tensor in ema.state_tensors().items():
        assert torch.equal(tensor, average[name])
    assert pointers == [p.data_ptr() for p in module.parameters()], "optimizers and compiled graphs hold these"


def test_resumed_equals_uninterrupted() -> None:
    def run(stop: int | None) -> dict[str, Tensor]:
        module = _module()
        optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.5)
        ema = ExponentialMovingAverage(module, decay=0.999)
        for step in range(8):
            if step == stop:
                saved, count = {name: tensor.clone() for name, tensor in ema.state_tensors().items()}, ema.num_updates
                ema = ExponentialMovingAverage(module, decay=0.999)
                ema.load(saved, num_updates=count)
            _step(module, optimizer, step)
            ema.update()
        return ema.state_tensors()

    whole, resumed = run(None), run(4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_buffers_are_the_live_ones_for_a_broadcast() -> None:
    ema = ExponentialMovingAverage(_module(), decay=0.9)
    for tensor in ema.buffers():
        tensor.fill_(3)
    kept = ema.state_tensors()
    assert all((kept[name] == 3).all() for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "offset"))
    assert len(ema.buffers()) == 7


def test_an_average_of_other_weights_is_refused() -> None:
    ema = ExponentialMovingAverage(_module(), decay=0.9)
    tensors = ema.state_tensors()
    with pytest.raises(UserError, match=r"belongs to other parameters: missing: 3\.bias$"):
        ema.load({name: tensor for name, tensor in tensors.items() if name != "3.bias"}, num_updates=1)
    with pytest.raises(UserError, match=r"belongs to other parameters: wrong shape: 3\.weight has shape \(3, 5\) instead of \(3, 64\)$"):
        ema.load({**tensors, "3.weight": torch.zeros(3, 5)}, num_updates=1)
    with pytest.raises(UserError, match=r"ema is 1\.0; it must be 0 or more and less than 1"):
        ExponentialMovingAverage(_module(), decay=1.0)


def test_the_average_of_synchronised_norms_is_that_of_plain_ones_before_and_after() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    synchronised = copy.deepcopy(plain)
    assert synchronise_norms(synchronised, image_size=8, agree=bool) == (frozenset({"1"}), "")
    averages = [ExponentialMovingAverage(module, decay=0.5, warm_up=False) for module in (plain, synchronised)]
    with norms_alone():
        for _ in range(3):
            images = torch.randn(4, 3, 8, 8)
            for module, average in zip((plain, synchronised), averages):
                module(images)
                average.update()
    one, other = (average.state_tensors() for average in averages)
    assert {name for name in one if "running" in name} == {"1.running_mean", "1.running_var"}
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert plain_norms(synchronised) == {"1"}
    averages[1].copy_to(synchronised)  # as at the phase's end
    assert all(torch.equal(synchronised.state_dict()[name], tensor) for name, tensor in one.items())


def some_weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    drawn = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
    return {"weight": drawn.to(dtype), "frozen": torch.full((2,), 0.1).to(dtype), "num_batches_tracked": torch.tensor(seed)}


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_ends_are_the_parents_and_what_both_share_is_the_same_at_every_point(first: int, second: int, dtype: torch.dtype) -> None:
    start, end = some_weights(first, dtype), some_weights(second, dtype)
    assert all(between(start, end, 0.0)[name] is tensor for name, tensor in start.items())
    assert all(between(start, end, 1.0)[name] is tensor for name, tensor in end.items())
    for share in BLENDS:
        made = between(start, end, share)
        assert torch.equal(made["frozen"], start["frozen"])
        assert made["num_batches_tracked"] == second
        assert made["weight"].dtype == dtype
        exact = start["weight"].double() + share * (end["weight"].double() - start["weight"].double())
        assert torch.allclose(made["weight"].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert between({"weight": start["weight"]}, end, 0.0)["frozen"] is end["frozen"], "a checkpoint holds only what the phase may change"
