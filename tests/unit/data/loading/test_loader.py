"""The loader's promises on real shards: the same pixels for any number of ranks, workers and micro-batches, from any step on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dtl.config.models import AugmentConfig, DataConfig
from dtl.data.loading.batch import Batch
from dtl.data.loading.loader import StepLoader
from dtl.data.open import ensure_packed
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import train_transform

TRANSFORM = train_transform(image_size=12, augment=AugmentConfig(preset="cifar", rotation=15, erasing=0.5, color_jitter=0.2))
NUM_STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = ensure_packed("digits", DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))), split="val", progress=False, log=lambda line: None)
    return Shards.open(folder)


def loader(shards: Shards, *, rank: int = 0, world: int = 1, workers: int = 0, micro: int | None = None, batch: int = 50, pairs: bool = False) -> StepLoader:
    def plan(epoch: int) -> EpochPlan:
        return EpochPlan(shards.shard_sizes, seed=7, epoch=epoch, global_batch_size=batch)

    layout = RankLayout.for_plan(plan(0), num_ranks=world, micro_batch_size=micro, pairs=pairs)
    return StepLoader(shards, TRANSFORM, plans=plan, layout=layout, rank=rank, image_size=12, seed=7, workers=workers)


def steps(shards: Shards, first_step: int = 0, num_steps: int = NUM_STEPS, **options: int | None) -> list[list[Batch]]:
    return list(loader(shards, **options).steps(0, first_step, num_steps))  # type: ignore[arg-type]


def real_slots(step_of_ranks: list[list[Batch]]) -> dict[int, tuple[int, int, str]]:
    """slot -> (sample, label, hash of the pixels), put together over the ranks."""
    found: dict[int, tuple[int, int, str]] = {}
    for batch in (batch for batches in step_of_ranks for batch in batches):
        for i, slot in enumerate(batch.slots.tolist()):
            if slot < 0:
                assert batch.weights[i] == 0
                continue
            assert slot not in found
            pixels = hashlib.sha256(batch.images[i].contiguous().numpy().tobytes()).hexdigest()
            found[slot] = (int(batch.samples[i]), int(batch.labels[i]), pixels)
    return found


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 2, None), (1, 0, 7), (2, 1, None), (3, 0, 5), (7, 0, None), (2, 3, 9)])
def test_ranks_workers_and_micro_batches_do_not_change_a_pixel(shards: Shards, world: int, workers: int, micro: int | None) -> None:
    expected = [real_slots([step]) for step in steps(shards)]
    ranks = [steps(shards, rank=rank, world=world, workers=workers, micro=micro) for rank in range(world)]
    got = [real_slots([ranks[rank][step] for rank in range(world)]) for step in range(NUM_STEPS)]
    assert got == expected


def test_it_starts_anywhere_and_runs_across_epochs(shards: Shards) -> None:
    per_epoch = EpochPlan(shards.shard_sizes, seed=7, epoch=0, global_batch_size=50).num_steps
    whole = [real_slots([step]) for step in steps(shards, num_steps=2 * per_epoch)]
    for first in (1, per_epoch - 1, per_epoch):
        rest = list(loader(shards, workers=1).steps(0, first, 2 * per_epoch - first)) if first < per_epoch else list(loader(shards).steps(1, 0, per_epoch))
        assert [real_slots([step]) for step in rest] == whole[first:]
    assert whole[0] != whole[per_epoch], "another epoch, another order"


def test_batches_are_uint8_channels_last_with_labels_of_the_index(shards: Shards) -> None:
    batch = steps(shards, num_steps=1)[0][0]
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == shards.labels[batch.samples.numpy()].tolist()


def test_a_rank_without_any_sample_gets_padding_only(shards: Shards) -> None:
    """360 samples in 8 steps: 45 a step for 60 ranks, so the first of every four has none."""
    without = steps(shards, rank=4, world=60, num_steps=2)
    assert [(batch.images.shape[0], batch.slots.tolist(), batch.weights.tolist()) for step in without for batch in step] == [(1, [-1], [0.0])] * 2
    with_one = steps(shards, rank=5, world=60, num_steps=2)
    assert [(batch.images.shape[0], batch.slots.tolist(), batch.weights.tolist()) for step in with_one for batch in step] == [(1, [3], [1.0])] * 2


def test_a_damaged_sample_keeps_its_slot_at_weight_0_and_is_named(shards: Shards, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shards.folder, copy)
    plan = EpochPlan(shards.shard_sizes, seed=7, epoch=0, global_batch_size=50)
    victim = int(plan.step_samples(0)[3])
    tar = next(copy.glob("*.tar"))
    with tar.open("r+b") as file:
        file.seek(int(shards.offsets[victim]) + int(shards.sizes[victim]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    damaged = Shards.open(copy)
    clean, got = steps(shards, num_steps=2), steps(damaged, num_steps=2, workers=1)
    assert [sample for sample, _ in got[0][0].bad] == [victim]
    problem = got[0][0].bad[0][1]
    assert problem.shard == tar.name
    assert problem.offset == int(shards.offsets[victim])
    assert problem.key == shards.key(victim)
    assert "crc" in problem.reason.lower() or "checksum" in problem.reason.lower()
    assert got[0][0].weights.tolist() == [0.0 if i == 3 else 1.0 for i in range(len(got[0][0].weights))]
    others = np.arange(len(got[0][0].weights)) != 3
    assert torch.equal(got[0][0].images[others], clean[0][0].images[others])
    assert torch.equal(got[1][0].images, clean[1][0].images)


def test_the_loader_draws_nothing_from_the_training_generator(shards: Shards) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    steps(shards, workers=1, num_steps=1)
    assert torch.equal(torch.rand(4), expected)


def test_leaving_early_ends_the_workers(shards: Shards) -> None:
    import multiprocessing

    stream = loader(shards, workers=2).steps(0, 0, NUM_STEPS)
    next(stream)
    assert len(multiprocessing.active_children()) >= 2
    stream.close()  # type: ignore[attr-defined]
    assert not [child for child in multiprocessing.active_children() if "pt_data" in child.name or child.is_alive()]
