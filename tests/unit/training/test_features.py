"""Features of a frozen backbone: where the network may be cut, when it pays, and what the cache holds."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtl.config.models import AugmentConfig, PhaseConfig
from dtl.data.loading.loader import BatchDataset
from dtl.data.sampling.plan import EpochPlan, MicroBatch, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.distributed.runtime import Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.models.network import Network, Normalise
from dtl.models.preprocessing import Preprocessing
from dtl.training import features
from dtl.training.features import Backbone, FeatureCache, FeatureDataset, Part, decide, find_cut, find_twins

Pair = tuple[Shards, Shards]


def network_of(module: nn.Module, head: str) -> Network:
    return Network(name="test", module=module.train(), heads=(head,), preprocessing=Preprocessing())


def cut_of(module: nn.Module, head: str, *more: str, norms: bool = False) -> tuple[str | None, str]:
    network = network_of(module, head)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train(norms)
    trainable = [name for name, _ in module.named_parameters() if name.startswith((f"{head}.", *more))]
    return find_cut(network, trainable, image_size=16)


class Odd(nn.Module):
    """A backbone and a head, joined in the way that `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.fc = kind, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6)), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        if self.kind == "random":
            features = features + torch.rand_like(features)
        if self.kind == "rows":
            return self.fc(features.repeat(2, 1))[: len(images)]  # type: ignore[no-any-return]
        if self.kind == "keyword":
            return self.fc(input=features)  # type: ignore[no-any-return]
        logits = self.fc(features)
        if self.kind == "twice":
            logits = logits + self.fc(features)
        return logits * 2 if self.kind == "after" else logits  # type: ignore[no-any-return]


def test_the_cut_is_the_head_with_its_dropout() -> None:
    assert cut_of(Odd("plain"), "fc") == ("fc", "")
    module = networks.with_dropout(4)
    assert cut_of(module, "classifier.1") == ("classifier", "")
    assert module.classifier.training, "each part keeps its mode"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("random", "the frozen part is random (dropout or stochastic depth)"),
        ("after", "the output of the network is not the output of fc"),
        ("twice", "fc is not called exactly once with one tensor"),
        ("keyword", "fc is not called exactly once with one tensor"),
        ("rows", "fc does not get one row per image"),
    ],
)
def test_a_network_that_cannot_be_cut_is_told_with_the_reason(kind: str, why: str) -> None:
    assert cut_of(Odd(kind), "fc") == (None, why)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_named_as_such(factor: float) -> None:
    module = Odd("plain")
    with torch.no_grad():
        for value in module.body.parameters():
            value.mul_(factor)
    assert cut_of(module, "fc") == (None, "the frozen part gives values that are not finite (its weights are too large, or not finite)")


def test_what_changes_from_step_to_step_is_not_cached() -> None:
    assert cut_of(Odd("plain"), "fc", "body.2.") == (None, "more than the head is trained")
    assert cut_of(networks.with_dropout(4), "classifier.1", norms=True)[1].startswith("norm layers of the backbone update their running statistics")


def test_looking_for_a_cut_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cut_of(Odd("plain"), "fc")
    torch.manual_seed(3)
    module = Odd("plain")
    torch.manual_seed(3)
    find_cut(network_of(module, "fc"), ["fc.weight", "fc.bias"], image_size=16)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("config", "facts", "views", "line"),
    [
        ({"cache_features": False}, {}, 0, ""),
        ({}, {"fixed": True}, 1, ""),
        ({}, {"fixed": True, "num_epochs": 1}, 0, ""),
        ({"cache_features": True}, {"fixed": True, "num_epochs": 1}, 1, ""),
        ({"views": 4}, {}, 4, ""),
        ({"views": 4}, {"num_epochs": 4}, 0, ""),
        ({"views": 4}, {"fixed": True}, 1, ""),
        ({}, {}, 0, "features are computed each epoch, since images are augmented at random; phases.head.views 4 caches four views of each, "),
        ({"cache_features": True}, {}, 1, ""),
        ({}, {"why_not": "it is odd"}, 0, "features are computed each epoch: it is odd"),
        ({}, {"why_not": "more than the head is trained"}, 0, ""),
        ({"mixup": 0.2}, {"fixed": True}, 0, "features are computed each epoch: mixup and cutmix mix images"),
        ({"task": "rotate"}, {"fixed": True}, 0, "features are computed each epoch: the task rotate changes the images"),
    ],
)
def test_when_features_are_cached(config: dict[str, Any], facts: dict[str, Any], views: int, line: str) -> None:
    found, told = decide("head", PhaseConfig(train="head", **config), **{"why_not": "", "fixed": False, "num_epochs": 8, **facts})
    assert found == views
    assert told.startswith(line)
    assert bool(told) == bool(line)


def test_caching_that_is_demanded_and_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"^phases\.head\.cache_features is true, but mixup and cutmix mix images$"):
        decide("head", PhaseConfig(cache_features=True, cutmix=1.0), why_not="", fixed=True, num_epochs=3)


def cache_in(place: Path, runtime: Runtime, **options: Any) -> tuple[FeatureCache, list[str]]:
    lines: list[str] = []
    values = {
        "seed": 0,
        "image_size": 8,
        "workers": 0,
        "batch_size": 200,
        "before_step": lambda batches: False,
        "heart": Heartbeat(),
        "log": lines.append,
        **options,
    }
    return FeatureCache(place=place, runtime=runtime, normalise=Normalise(Preprocessing(), torch.device("cpu"), channels_last=False), **values), lines


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(5, 10))).eval()


def request(samples: list[int], epoch: int) -> MicroBatch:
    numbers = np.array(samples)
    return MicroBatch(epoch=epoch, step=0, samples=numbers, slots=np.arange(len(samples)), weights=np.ones(len(samples), np.float32))


def test_the_cache_holds_what_the_backbone_gives_and_is_found_again(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    module, val = network(), digits[1]
    part = Part("val", val, eval_transform(image_size=8), (0,))
    cache, lines = cache_in(tmp_path / "features", runtime)
    folder = cache.folder(module, "fc", [part], frozen="abc")
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["facts.json", "val.npy"]
    assert list((tmp_path / "features").iterdir()) == [folder]
    dataset = FeatureDataset(val, folder, "val", 0)
    batch = dataset.__getitems__(request([7, 300, 7], epoch=5))
    assert batch.labels.tolist() == [int(val.labels[number]) for number in (7, 300, 7)]
    assert torch.equal(batch.images[0], batch.images[2])
    images = BatchDataset(val, part.transform, image_size=8, seed=0).__getitems__(request([7, 300], epoch=0)).images
    expected = Backbone(module, "fc")(Normalise(Preprocessing(), torch.device("cpu"), channels_last=False)(images))
    torch.testing.assert_close(batch.images[:2], expected.detach())

    assert cache_in(tmp_path / "features", runtime, seed=9)[0].folder(module, "fc", [part], frozen="abc") == folder, "nothing is drawn from the seed"
    assert cache.folder(module, "fc", [part], frozen="other weights") != folder
    assert [line.startswith("features of 360 images computed once in ") for line in lines] == [True, True]


def test_each_view_is_drawn_for_its_epoch_and_they_go_round(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    augment = train_transform(image_size=8, augment=AugmentConfig(preset="cifar"))
    cache, _ = cache_in(tmp_path, runtime)
    folder = cache.folder(network(), "fc", [Part("train", digits[1], augment, (3, 4))], frozen="abc")
    assert folder is not None
    dataset = FeatureDataset(digits[1], folder, "train", 3)
    views = [dataset.__getitems__(request(list(range(50)), epoch)).images for epoch in (3, 4, 5)]
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    other, _ = cache_in(tmp_path, runtime, seed=1)
    assert other.folder(network(), "fc", [Part("train", digits[1], augment, (3, 4))], frozen="abc") != folder


def test_a_stop_leaves_nothing_behind(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    cache, lines = cache_in(tmp_path, runtime, before_step=lambda batches: True)
    assert cache.folder(network(), "fc", [Part("val", digits[1], eval_transform(image_size=8), (0,))], frozen="abc") is None
    assert list(tmp_path.glob("[!c]*")) + lines == []


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path, digits: Pair, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    cache, _ = cache_in(tmp_path / "features", runtime)
    with pytest.raises(UserError, match=r"the features of 360 images in 1 view take 0\.0 GiB, and .*features has 0\.0 GiB free; use fewer views"):
        cache.folder(network(), "fc", [Part("val", digits[1], eval_transform(image_size=8), (0,))], frozen="abc")
    assert list((tmp_path / "features").iterdir()) == []


def test_a_damaged_sample_has_no_weight_and_is_told_where_it_was_trained_on(tmp_path: Path, digits: Pair) -> None:
    facts = {"shard": "a.tar", "key": "k", "offset": 512, "reason": "broken"}
    np.save(tmp_path / "val.npy", np.zeros((1, 360, 5), np.float32))
    (tmp_path / "facts.json").write_text(json.dumps({"damaged": {"val": [[0, 7, facts]]}}))
    dataset = FeatureDataset(digits[1], tmp_path, "val", 0)
    asked = request([6, 7, 7], epoch=0)
    asked.slots[2] = -1  # a pad
    batch = dataset.__getitems__(asked)
    assert batch.weights.tolist() == [1.0, 0.0, 0.0]
    assert [(sample, damage.reason) for sample, damage in batch.bad] == [(7, "broken")]
    assert asked.weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("leads", [True, False])
def test_each_message_between_nodes_is_a_sign_of_life_of_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: bool) -> None:
    """The exchange may take longer than run.timeout_minutes, and ranks that only wait must pass as many stages as those that send."""
    monkeypatch.setattr(features, "_EXCHANGE_BYTES", 1)
    nodes = {0: [0, 1], 2: [2, 3]}
    sent: list[int] = []
    waits: list[int] = []
    runtime: Any = SimpleNamespace(
        rank=0 if leads else 1, leads_node=leads, nodes=nodes, join_nodes=lambda: None, from_node=lambda leader, rows: sent.append(leader),
        barrier=lambda: waits.append(heart.tick),
    )  # fmt: skip
    heart = Heartbeat()
    cache, _ = cache_in(tmp_path, runtime, heart=heart)
    plan = EpochPlan(np.array([40]), seed=0, epoch=0, global_batch_size=8, shuffle=False)
    cache._exchange_nodes(np.memmap(tmp_path / "rows", np.float32, "w+", shape=(1, 40, 3)), plan, RankLayout.for_plan(plan, num_ranks=4, micro_batch_size=2))
    assert waits == [1, 2, 3, 4, 5, 6], "five messages, and the end"
    assert sent == ([0, 2] * 5 if leads else [])


def test_validation_images_with_twins_in_train_are_found() -> None:
    shards = SimpleNamespace(num_samples=3)
    train = SimpleNamespace(values=np.eye(3, 5, dtype=np.float32)[None], damaged={}, shards=shards)
    rows = np.array([[0, 2, 0.1, 0, 0], [0, 0, 0, 1, 0], [9, 0, 0, 0, 0]], np.float32)
    val = SimpleNamespace(values=rows[None], damaged={(0, 2): None}, shards=shards)
    twins = find_twins(train, val)  # type: ignore[arg-type]
    assert [(one.split, one.sample, one.other, round(one.near, 4)) for one in twins] == [("val", 0, 1, 0.7179)]
    train.values = np.repeat(train.values, 2, axis=0)  # two augmented views
    assert find_twins(train, val) == []  # type: ignore[arg-type]
