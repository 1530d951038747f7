"""Which plan, layout and loader a phase and an evaluation get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dtl.config.models import AugmentConfig, PhaseConfig
from dtl.data.loading.batch import Batch
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase, plan_phases

Pair = tuple[Shards, Shards]


def loaders_of(digits: Pair, **options: Any) -> DataLoaders:
    values = {"rank": 0, "world_size": 1, "image_size": 8, "global_batch_size": 100, "micro_batch_size": None, "workers": 0, "seed": 3, "window": 256}
    augment = train_transform(image_size=8, augment=AugmentConfig(preset="cifar"))
    return DataLoaders(train=digits[0], val=digits[1], train_transform=augment, val_transform=eval_transform(image_size=8), **{**values, **options})


def phase_of(loaders: DataLoaders, **config: Any) -> Phase:
    before = {"before": PhaseConfig(steps=20)}
    return plan_phases({**before, "all": PhaseConfig(**{"steps": 17, **config})}, steps_per_epoch=loaders.steps_per_epoch, num_classes=10)[1]


def test_an_epoch_is_every_sample_once_and_evaluation_too(digits: Pair) -> None:
    loaders = loaders_of(digits)
    assert loaders.steps_per_epoch == 15
    for epoch in (0, 1):
        seen = np.concatenate([loaders.plan(epoch).step_samples(step) for step in range(15)])
        assert sorted(seen.tolist()) == list(range(1437))
    seen_in_val = [batch.samples[batch.slots >= 0] for batches in loaders.val_steps() for batch in batches]
    assert torch.cat(seen_in_val).tolist() == list(range(360))


def test_two_plans_are_kept_and_one_that_was_dropped_comes_again_the_same(digits: Pair) -> None:
    loaders = loaders_of(digits)
    first = loaders.plan(0).step_samples(3)
    assert loaders.plan(0) is loaders.plan(0)
    kept = loaders.plan(1)
    loaders.plan(2)
    assert loaders.plan(1) is kept
    assert loaders.plan(0).step_samples(3).tolist() == first.tolist()


def test_a_phase_begins_at_its_own_epoch_and_at_any_step(digits: Pair) -> None:
    loaders = loaders_of(digits)
    phase = phase_of(loaders)
    steps = list(loaders.train_steps(phase, 13))
    assert [(batches[0].epoch, batches[0].step) for batches in steps] == [(2, 13), (2, 14), (3, 0), (3, 1)]
    for number, batches in enumerate(steps, start=13):
        samples = torch.cat([batch.samples[batch.slots >= 0] for batch in batches]).tolist()
        assert samples == loaders.step_samples(phase, number).tolist()
        labels = torch.cat([batch.labels[batch.slots >= 0] for batch in batches]).tolist()
        assert labels == loaders.step_labels(phase, number).tolist()
        assert len(samples) == loaders.step_size(phase, number)
    assert [loaders.step_size(phase, number) for number in (13, 14, 15)] == [96, 96, 95]


def test_ranks_share_a_step(digits: Pair) -> None:
    whole = loaders_of(digits)
    phase = phase_of(whole)
    parts = []
    for rank in range(3):
        loaders = loaders_of(digits, rank=rank, world_size=3)
        batches = next(iter(loaders.train_steps(phase, 0)))
        parts += [batch.samples[batch.slots >= 0] for batch in batches]
        assert loaders.batch_name(phase, 0).startswith(f"{whole.step_size(phase, 0) // 3} samples starting at ")
    assert torch.cat(parts).tolist() == whole.step_samples(phase, 0).tolist()


def test_mixing_needs_slots_in_pairs(digits: Pair) -> None:
    loaders = loaders_of(digits, world_size=4, micro_batch_size=5)
    assert loaders.layout(phase_of(loaders)).micro_batch_size == 5
    assert loaders.layout(phase_of(loaders, mixup=0.2)).micro_batch_size % 2 == 0
    assert loaders.layout(phase_of(loaders, cutmix=1.0)).micro_batch_size % 2 == 0


def test_debugging_takes_few_steps(digits: Pair) -> None:
    loaders = loaders_of(digits, max_train_steps=4, max_val_steps=2)
    assert loaders.steps_per_epoch == 4
    steps = list(loaders.train_steps(phase_of(loaders, steps=6), 0))
    assert [batches[0].step for batches in steps] == [0, 1, 2, 3, 0, 1]
    assert len(list(loaders.val_steps())) == 2


def test_a_label_that_is_no_class_counts_as_the_first(digits: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = loaders_of(digits)
    phase = phase_of(loaders)
    labels = np.array(digits[0].labels)
    samples = loaders.step_samples(phase, 0)
    labels[samples[:2]] = (-1, 10)
    monkeypatch.setattr(loaders.train, "labels", labels)
    found = loaders.step_labels(phase, 0)
    assert found[:2].tolist() == [0, 0]
    assert found[2:].tolist() == labels[samples[2:]].tolist()


def test_features_take_the_place_of_images(digits: Pair) -> None:
    class Features:
        def __getitems__(self, request: MicroBatch) -> Batch:
            number = len(request.samples)
            rows = torch.zeros(number, 7)
            return Batch(rows, torch.zeros(number), torch.ones(number), torch.tensor(request.samples), torch.tensor(request.slots), request.epoch, request.step)

    loaders = loaders_of(digits, workers=2)
    loaders.cached = {"train": Features()}
    (batch,) = next(iter(loaders.train_steps(phase_of(loaders), 0)))
    assert batch.images.shape == (96, 7)


def test_what_messages_and_checks_ask(digits: Pair) -> None:
    loaders = loaders_of(digits)
    phase = phase_of(loaders)
    assert loaders.classes == [str(digit) for digit in range(10)]
    assert sum(loaders.class_counts) == 1437
    assert loaders.short_side == 8
    assert len(set(loaders.sample_names(phase, 0, limit=3))) == 3
    assert loaders.cache_demands([phase]) == [], "local shards need no cache"
    assert loaders.shared_bytes == 0
    assert loaders_of(digits, workers=2).shared_bytes > 0
