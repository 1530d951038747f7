"""Frozen means frozen: no gradient, no drift, no dropout, whoever calls train(), and a checksum that would notice."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtl.errors import UserError
from dtl.models import freeze as freeze_module
from dtl.models.build import Network, Preprocessing, build, forward_logits, replace_head
from dtl.models.freeze import checksum, freeze, frozen_names, select, set_train_mode, unused_parameters
from dtl.models.groups import layer_groups
from dtl.models.norms import norms_alone


@pytest.fixture(scope="module")
def resnet() -> Network:
    return build("resnet18", num_classes=5, meta=True)


@pytest.mark.filterwarnings("error")
def test_a_search_for_nan_finds_none_where_there_are_no_values(resnet: Network) -> None:
    """`run.debug` printed "Error detected in AddBackward0", with a traceback, on healthy runs: it is on the meta device that unused parameters are found."""
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        assert unused_parameters(resnet, select(resnet, "all")) == set()
        assert torch.is_anomaly_enabled()


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_select(resnet: Network) -> None:
    names = {name for name, _ in resnet.module.named_parameters()}
    assert select(resnet, "all") == names
    assert select(resnet, "head") == select(resnet, "last:1") == {"fc.weight", "fc.bias"}
    assert select(resnet, "last:2") == {name for name in names if name.startswith(("fc.", "layer4.1."))}
    assert select(resnet, "last:10") == names
    assert select(resnet, ["layer4.*", "*.bias"]) == {n for n in names if n.startswith("layer4.") or n.endswith(".bias")}
    assert select(resnet, ["head", "layer4.1.*"]) == select(resnet, "last:2")
    assert select(resnet, "fc.weight") == {"fc.weight"}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("heads", "the pattern 'heads' matches no parameter; did you mean head?"),
        ("layer4", "did you mean layer4.*?"),
        (["layer4.*", "layr3.*"], "the pattern 'layr3.*' matches no parameter; did you mean layer3.*"),
        ("last:0", "last:N with N from 1 (the head) to 10"),
        ("last:11", "last:N with N from 1 (the head) to 10, the layer groups of torchvision/resnet18"),
        ("last:two", "'last:two' must be last:N"),
        ([], "an empty list trains nothing"),
        ("###", "names look like conv1.weight and fc.bias"),
    ],
)
def test_mistakes_are_told(resnet: Network, train: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        select(resnet, train)


def _training(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if part.training}


def test_modes_follow_the_parameters() -> None:
    network = build("mobilenet_v2", num_classes=5, meta=True)
    module = network.module
    freeze(module, select(network, "head"))
    set_train_mode(module)
    assert _training(module) == {"", "classifier", "classifier.0", "classifier.1"}, "the head's own dropout works, the rest rests"
    freeze(module, select(network, "last:2"))
    set_train_mode(module)
    assert {"features.18", "features.18.1", "classifier.0"} <= _training(module)
    assert not _training(module) & {"features", "features.17", "features.17.conv.3"}
    freeze(module, select(network, "all"))
    set_train_mode(module)
    assert all(part.training for part in module.modules())
    module.eval()
    assert _training(module) == set()

    network = build("vgg11_bn", num_classes=5, meta=True)
    freeze(network.module, select(network, "head"))
    set_train_mode(network.module)
    # Dropout between frozen layers has nobody to train.
    assert _training(network.module) == {"", "classifier.6"}

    freeze(network.module, frozenset())
    set_train_mode(network.module)
    assert _training(network.module) == set()


def test_attention_and_stochastic_depth_rest_too() -> None:
    network = build("timm/vit_tiny_patch16_224", num_classes=5, meta=True, options={"drop_path_rate": 0.1, "proj_drop_rate": 0.1})
    freeze(network.module, select(network, "last:2"))
    set_train_mode(network.module)
    training = _training(network.module)
    assert "blocks.11.attn" in training
    assert "blocks.11.drop_path1" in training
    assert not any(name.startswith(("blocks.10", "pos_drop", "patch_embed")) for name in training)


def test_parts_of_a_module() -> None:
    network = build("dtl/resnet_tiny", num_classes=5)
    mixed = freeze(network.module, select(network, ["0.1.weight", "head"]))
    assert mixed == ["0.1"]
    set_train_mode(network.module)
    assert not network.module.get_submodule("0.1").training


@pytest.mark.parametrize("train", ["head", "last:2", ["3.0.bn1.*", "head"]])
@pytest.mark.parametrize("way", ["set", "train", "ddp", "deepcopy", "pickle", "child"])
def test_nothing_frozen_changes(train: str, way: str, one_rank: None) -> None:
    torch.manual_seed(0)
    network = build("dtl/resnet_tiny", num_classes=5)
    trainable = select(network, train)
    freeze(network.module, trainable)
    module = network.module
    if way == "deepcopy":
        module = copy.deepcopy(module)
    elif way == "pickle":
        module = pickle.loads(pickle.dumps(module))
    frozen = frozen_names(module)
    assert set(frozen) >= {name for name, _ in module.named_parameters()} - trainable
    assert "0.1.running_mean" in frozen
    before = checksum(module, frozen)
    start = copy.deepcopy(module.state_dict())
    callee = DistributedDataParallel(module) if way == "ddp" else module
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        callee.eval()
        if way == "set":
            set_train_mode(module)
        elif way == "child":
            for child in module.children():
                child.train()
        else:
            callee.train()
        optimizer.zero_grad()
        callee(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert checksum(module, frozen) == before
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, start[name])}
    assert trainable <= changed
    assert not changed & set(frozen)


def test_norms_may_adapt() -> None:
    network = build("dtl/resnet_tiny", num_classes=5)
    module = network.module
    freeze(module, select(network, "head"), freeze_norm=False)
    set_train_mode(module)
    frozen = frozen_names(module, freeze_norm=False)
    assert not any("running" in name or "num_batches" in name for name in frozen)
    before, mean = checksum(module, frozen), module.get_buffer("0.1.running_mean").clone()
    module(torch.randn(4, 3, 32, 32))
    assert checksum(module, frozen) == before
    assert not torch.equal(module.get_buffer("0.1.running_mean"), mean)


def test_no_norm_changes_its_statistics_where_they_are_frozen() -> None:
    """Also of what is trained, and though `freeze_norm` is false; scale and shift are trained."""
    network = build("dtl/resnet_tiny", num_classes=5)
    module, trainable = network.module, select(network, "all")
    freeze(module, trainable, freeze_norm=False, frozen_statistics=True)
    set_train_mode(module)
    frozen = frozen_names(module, freeze_norm=False, frozen_statistics=True)
    assert set(frozen) == {name for name, _ in module.named_buffers()}
    before, scale = checksum(module, frozen), module.get_parameter("0.1.weight").clone()
    optimizer, images = torch.optim.SGD(module.parameters(), lr=0.1), torch.randn(4, 3, 32, 32)
    assert torch.equal(module(images)[:2], module(images[:2])), "an image's outputs depend on no other image"
    module(images).square().sum().backward()
    optimizer.step()
    assert checksum(module, frozen) == before
    assert not torch.equal(module.get_parameter("0.1.weight"), scale)
    freeze(module, trainable)
    set_train_mode(module)
    module(images)
    assert checksum(module, frozen) != before, "the next phase's norms are its own"


def test_checksum_sees_every_bit_and_no_order() -> None:
    network = build("dtl/resnet_tiny", num_classes=5)
    module, names = network.module, list(network.module.state_dict())
    reference = checksum(module, names)
    assert checksum(module, reversed(names)) == reference
    assert checksum(copy.deepcopy(module).to(memory_format=torch.channels_last), names) == reference
    module.get_parameter("6.bias").data.view(torch.int32)[0] ^= 1
    assert checksum(module, names) != reference
    module.get_parameter("6.bias").data.view(torch.int32)[0] ^= 1
    assert checksum(module, names) == reference
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert checksum(copy.deepcopy(module).to(dtype), names) != reference
    assert checksum(module, []) != reference


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("train", ["all", "head", "last:2"])
@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("googlenet", 64), ("inception_v3", 299)])
def test_every_parameter_gets_a_gradient(name: str, size: int, train: str, auxiliary: bool) -> None:
    """So DDP needs no search for unused ones. Checked against a real backward pass."""
    if name == "inception_v3" and not (train == "last:2" and auxiliary):
        network = build(name, num_classes=5, meta=True)  # one real pass takes a second; the shapes' answer is checked below
        expected = {key for key in select(network, train) if key.startswith("AuxLogits.")} if not auxiliary else set()
        assert unused_parameters(network, select(network, train), auxiliary=auxiliary) == expected
        return
    network = build(name, num_classes=5, options={} if name == "resnet18" else {"init_weights": False})
    trainable = select(network, train)
    unused = unused_parameters(network, trainable, auxiliary=auxiliary, image_size=size)
    assert bool(unused) == (name == "googlenet" and not auxiliary)
    freeze(network.module, trainable - unused)
    set_train_mode(network.module)
    logits, others = forward_logits(network.module, torch.randn(2, 3, size, size))
    loss = logits.sum() + sum(other.sum() for other in others if auxiliary)
    loss.backward()
    got = {key for key, parameter in network.module.named_parameters() if parameter.grad is not None}
    assert got == trainable - unused


def test_ddp_finds_nothing_missing(one_rank: None) -> None:
    network = build("googlenet", num_classes=5, options={"init_weights": False})
    for train in ("head", "last:2"):
        freeze(network.module, select(network, train))
        wrapped = DistributedDataParallel(network.module)
        for _ in range(2):  # DDP complains in the forward pass after the one that left a parameter out
            set_train_mode(network.module)
            logits, others = forward_logits(wrapped, torch.randn(2, 3, 64, 64))
            assert len(others) == 2
            (logits.sum() + sum(other.sum() for other in others)).backward()


def test_the_same_question_is_answered_without_another_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a thousand phases trains a few sets of layers."""
    network, asked = build("dtl/resnet_tiny", num_classes=3), list[int]()
    passes = freeze_module._without_gradient
    monkeypatch.setattr(freeze_module, "_without_gradient", lambda *arguments: (asked.append(1), passes(*arguments))[1])
    for _ in range(3):
        for train in ("all", "head"):
            assert unused_parameters(network, select(network, train), image_size=32) == set()
    assert len(asked) == 2
    replace_head(network, 4)
    network.module.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    assert unused_parameters(network, select(network, "all"), image_size=32) == {"spare"}
    assert len(asked) == 3


class _Choosy(nn.Module):
    """Its forward looks at values, so that shapes alone cannot run it; one layer never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.spare = nn.Linear(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean((2, 3))
        out: torch.Tensor = self.fc(pooled) if bool(pooled.sum() >= 0) else self.fc(-pooled)
        return out


def test_unused_layers_of_a_forward_that_looks_at_values() -> None:
    network = Network(_Choosy(), "choosy", ("fc",), Preprocessing(image_size=8))
    assert unused_parameters(network, select(network, "all")) == {"spare.weight", "spare.bias"}
    assert all(parameter.requires_grad for parameter in network.module.parameters())
    assert len(layer_groups(network)) == 2


def test_norms_that_an_earlier_phase_synchronised(one_rank: None) -> None:
    """SyncBatchNorm refuses every device but GPUs while it trains in a process group; shapes alone are on none."""
    network = build("dtl/resnet_tiny", num_classes=3)
    nn.SyncBatchNorm.convert_sync_batchnorm(network.module)
    with pytest.raises(ValueError, match="to be on GPU"):
        forward_logits(network.module.train(), torch.randn(2, 3, 32, 32))
    assert unused_parameters(network, select(network, "all")) == set()
    with norms_alone():
        logits, _ = forward_logits(network.module.train(), torch.randn(2, 3, 32, 32))
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="to be on GPU"):
        forward_logits(network.module.train(), torch.randn(2, 3, 32, 32))
