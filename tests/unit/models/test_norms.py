"""Batch norms over several ranks: the network computes what it has computed, whichever norms are synchronised."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dtl.models import norms
from dtl.models.build import build, forward_logits
from dtl.models.freeze import freeze, select, set_train_mode
from dtl.models.network import Network, eval_mode
from dtl.models.norms import gathering_norms, moved_norms, norms_alone, plain_norms, statistics_of_batch, synchronise_norms
from dtl.models.strict_load import strict_load

FAMILIES = {
    "timm/efficientnet_b0": 64,
    "timm/mobilenetv3_large_100": 64,
    "timm/regnety_004": 64,
    "timm/densenet121": 64,
    "timm/inception_v3": 96,
    "timm/resnet18": 64,
    "torchvision/mobilenet_v2": 64,
}


def outputs(network: Network, size: int) -> Tensor:
    with torch.inference_mode(), eval_mode(network.module):
        return forward_logits(network.module, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))[0]


def phase(network: Network, train: str, *, freeze_norm: bool = True) -> None:
    freeze(network.module, select(network, train), freeze_norm=freeze_norm)
    set_train_mode(network.module)


def synchronise(network: Network, size: int = 64) -> tuple[frozenset[str], str]:
    return synchronise_norms(network.module, image_size=size, agree=lambda value: value)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_that_is_trained_is_the_one_that_is_saved(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    size = FAMILIES[name]
    network = build(name, num_classes=3)
    phase(network, "all")
    before, keys, gathering = outputs(network, size), list(network.module.state_dict()), set(gathering_norms(network.module))
    names, left = synchronise(network, size)
    assert (names, left) == (gathering, "")
    assert torch.equal(outputs(network, size), before)
    assert list(network.module.state_dict()) == keys

    optimizer = torch.optim.SGD(network.module.parameters(), lr=1e-3)
    with norms_alone():
        logits, others = forward_logits(network.module, torch.randn(4, 3, size, size))
        (logits.square().mean() + sum(other.square().mean() for other in others)).backward()
    optimizer.step()
    validated = outputs(network, size)
    assert not torch.equal(validated, before)
    saved = build(name, num_classes=3)
    strict_load(saved.module, network.module.state_dict(), "what was trained")
    assert validated.isfinite().all()
    assert torch.equal(outputs(saved, size), validated)


def test_only_norms_that_gather_statistics_are_converted() -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    phase(network, "last:2")
    trained = set(gathering_norms(network.module))
    everything = {name for name, part in network.module.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert synchronise(network, 32)[0] == trained < everything
    phase(network, "last:2")
    assert {name for name, part in network.module.named_modules() if isinstance(part, nn.SyncBatchNorm)} == trained
    assert synchronise(network, 32) == (frozenset(), ""), "they are"


def test_a_phase_finds_the_norms_as_they_were_built() -> None:
    """What is synchronised would else depend on the phase in which a run was started again."""
    network = build("dtl/resnet_tiny", num_classes=3)
    phase(network, "all")
    tensors = dict(network.module.state_dict(keep_vars=True))
    names, _ = synchronise(network, 32)
    before = outputs(network, 32)
    assert plain_norms(network.module) == names
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in network.module.modules())
    assert all(tensor is tensors[name] for name, tensor in network.module.state_dict(keep_vars=True).items())
    assert torch.equal(outputs(network, 32), before)
    assert plain_norms(network.module) == frozenset()
    assert synchronise(network, 32)[0] == names


def test_a_norm_without_parameters_gathers_with_what_holds_it() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    module.train()
    assert synchronise_norms(module, image_size=8, agree=lambda value: value) == (frozenset({"1"}), "")
    assert isinstance(module[1], nn.SyncBatchNorm)


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.BatchNorm2d):
    """Computes as its parent does."""


def small(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).train()


def test_what_has_no_synchronised_form_is_left_alone_and_named() -> None:
    hooked, patched = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda module, images, output: output + 1)
    patched.forward = lambda images: images  # type: ignore[method-assign, assignment]
    module = small(Scaled(4), hooked, patched, Named(4))
    names, line = synchronise_norms(module, image_size=8, agree=lambda value: value)
    assert names == {"4"}
    assert line == ("SyncBatchNorm: 1 (Scaled), 2 (BatchNorm2d), 3 (BatchNorm2d) keep the statistics of each rank: there is no synchronised form of them")
    assert isinstance(module[1], Scaled)


def test_a_shared_norm_is_converted_under_all_of_its_names() -> None:
    norm = nn.BatchNorm2d(4)
    module = small(norm, nn.ReLU(), norm)
    synchronise_norms(module, image_size=8, agree=lambda value: value)
    assert isinstance(module[1], nn.SyncBatchNorm)
    assert module[1] is module[3]
    plain_norms(module)
    assert module[1] is module[3] is norm


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_conversion_that_changes_the_outputs_is_undone_on_all_ranks(monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """`elsewhere`: this rank sees no change, the main process does."""
    if not elsewhere:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        monkeypatch.setattr(norms, "_synchronised", lambda norm: convert(norm))  # as before: whatever its type
    module = small(nn.BatchNorm2d(4) if elsewhere else Scaled(4))
    norm = module[1]
    names, line = synchronise_norms(module, image_size=8, agree=lambda value: False if elsewhere else value)
    assert names == frozenset()
    assert line == "SyncBatchNorm would change what this network computes: its 1 norm keeps the statistics of each rank"
    assert module[1] is norm


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
