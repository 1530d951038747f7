"""Damage of every kind, met by the loader: named in the batch, at weight 0, and nothing else moves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import damage
import numpy as np
import pytest
import torch
from tiny_images import encoded, huge_bmp, image_folder

from dtl.config.models import AugmentConfig
from dtl.data.loading.batch import Batch
from dtl.data.loading.loader import StepLoader
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import train_transform
from dtl.errors import UnreachableSample, UserError

SAMPLE = 9  # the one that is damaged


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 20, "bee": 15})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=20_000, processes=1, progress=False)
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def epoch(folder: Path, *, world: int = 1, workers: int = 0, between: Callable[[int], None] = lambda step: None) -> list[Batch]:
    """All batches of an epoch of 4 steps, rank after rank; `between(step)` after each step."""
    shards = Shards.open(folder)
    plan = EpochPlan(shards.shard_sizes, seed=0, epoch=0, global_batch_size=10)
    layout = RankLayout.for_plan(plan, num_ranks=world, micro_batch_size=None)
    transform = train_transform(image_size=8, augment=AugmentConfig(preset="light"))
    batches = []
    for rank in range(world):
        loader = StepLoader(shards, transform, plans=lambda e: plan, layout=layout, rank=rank, image_size=8, seed=0, workers=workers)
        for step, found in enumerate(loader.steps(0, 0, plan.num_steps)):
            batches += found
            between(step)
    return batches


def real(batches: list[Batch]) -> dict[int, tuple[int, int, int, bytes]]:
    """sample -> (step, slot, label, pixels) of what counts."""
    found = {}
    for batch in batches:
        for i in np.flatnonzero(batch.weights.numpy() > 0):
            place = batch.step, int(batch.slots[i]), int(batch.labels[i]), batch.images[i].contiguous().numpy().tobytes()
            found[int(batch.samples[i])] = place
    return found


def neighbours(folder: Path) -> set[int]:
    """The samples of the damaged one's shard, from it on."""
    shards = Shards.open(folder)
    return {n for n in range(SAMPLE, shards.num_samples) if shards.shard_of(n) == shards.shard_of(SAMPLE)}


def whole_shard(folder: Path) -> set[int]:
    shards = Shards.open(folder)
    return {n for n in range(shards.num_samples) if shards.shard_of(n) == shards.shard_of(SAMPLE)}


def only(folder: Path) -> set[int]:
    return {SAMPLE}


# what is done, which samples it hits, what is said, and whether the key can still be read
DAMAGES: dict[str, tuple[Callable[[Path], object], Callable[[Path], set[int]], str, bool]] = {
    "one bit": (lambda f: damage.flip_bit(f, SAMPLE), only, "the checksum is wrong (crc32 ", True),
    "a zeroed block": (lambda f: damage.zero_block(f, SAMPLE), only, "the checksum is wrong (crc32 ", True),
    "a truncated shard": (lambda f: damage.cut_shard(f, SAMPLE), neighbours, "bytes before the image does", True),
    "a cut in a header": (lambda f: damage.cut_shard(f, SAMPLE, in_header=True), neighbours, "bytes before the image does", False),
    "a missing shard": (lambda f: damage.shard_path(f, SAMPLE).unlink(), whole_shard, "the shard is missing", False),
    "no image, crc right": (lambda f: damage.put_image(f, SAMPLE, b"nothing"), only, "not an image", True),
    "half an image, crc right": (lambda f: damage.put_image(f, SAMPLE, encoded(height=10, width=12)[:-40]), only, "image file is truncated", True),
    "60,000 x 60,000": (lambda f: damage.put_image(f, SAMPLE, huge_bmp(), width=60_000, height=60_000), only, "60000 x 60000 pixels", True),
    "more pixels than are decoded": (lambda f: damage.rewrite_index(f, SAMPLE, heights=12_000, widths=15_000), only, "more than the 178,956,970", True),
    "another size than the index": (lambda f: damage.rewrite_index(f, SAMPLE, heights=99), only, "but 12 x 99 according to the index", True),
    "a label out of range": (lambda f: damage.rewrite_index(f, SAMPLE, labels=7), only, "label 7 is not one of 2 classes", True),
    "a label below 0": (lambda f: damage.rewrite_index(f, SAMPLE, labels=-3), only, "label -3 is not one of 2 classes", True),
}


IN_A_WORKER = ("one bit", "a missing shard", "no image, crc right")  # what is said travels between processes


@pytest.mark.parametrize(("which", "world", "workers"), [*((w, n, 0) for w in DAMAGES for n in (1, 2)), *((w, 1, 1) for w in IN_A_WORKER)])
def test_a_damaged_sample_is_named_and_nothing_else_moves(packed: Path, copy: Path, which: str, world: int, workers: int) -> None:
    do, hit, reason, key_is_left = DAMAGES[which]
    expected = hit(copy)
    key = Shards.open(copy).key(SAMPLE)
    do(copy)
    batches = epoch(copy, world=world, workers=workers)
    bad = {sample: found for batch in batches for sample, found in batch.bad}
    assert set(bad) == expected
    shards = Shards.open(copy)
    found = bad[SAMPLE]
    assert found.shard == shards.manifest.shards[shards.shard_of(SAMPLE)].url
    assert found.offset == shards.offsets[SAMPLE]
    assert found.key == (key if key_is_left else "")
    assert reason in found.reason
    assert "\n" not in str(found)

    good = real(epoch(packed, world=world))
    assert real(batches) == {sample: place for sample, place in good.items() if sample not in expected}
    for batch in batches:
        for i, sample in enumerate(batch.samples.tolist()):
            if sample in expected:
                assert batch.weights[i] == 0
                assert (batch.images[i] == 0).all()


def test_a_label_out_of_range_never_reaches_the_loss(copy: Path) -> None:
    damage.rewrite_index(copy, SAMPLE, labels=7)
    for batch in epoch(copy):
        assert ((batch.labels >= 0) & (batch.labels < 2)).all()


def test_a_damaged_header_before_an_image_that_does_not_decode(copy: Path) -> None:
    damage.put_image(copy, SAMPLE, b"nothing")
    damage.damage_header(copy, SAMPLE)
    bad = [one for batch in epoch(copy) for one in batch.bad]
    assert [(sample, found.key) for sample, found in bad] == [(SAMPLE, "")]


def test_a_damaged_header_alone_harms_nothing(packed: Path, copy: Path) -> None:
    """The image is where the index says, whatever stands before it."""
    damage.damage_header(copy, SAMPLE)
    assert real(epoch(copy)) == real(epoch(packed))


def test_another_shard_in_its_place(copy: Path) -> None:
    shards = Shards.open(copy)
    paths = [copy / shard.url for shard in shards.manifest.shards]
    shutil.copy(paths[-1], paths[0])
    bad = {sample for batch in epoch(copy) for sample, _ in batch.bad}
    assert bad == {sample for sample in range(shards.num_samples) if shards.shard_of(sample) == 0}


@pytest.mark.parametrize("how", ["shrunk", "gone", "written over"])
def test_a_shard_that_changes_while_it_is_read(copy: Path, how: str) -> None:
    """No SIGBUS, no hang: what was read before is good, and what comes after is named."""
    shards = Shards.open(copy)
    path = copy / shards.manifest.shards[0].url

    def change(step: int) -> None:
        if step == 1:
            if how == "shrunk":
                os.truncate(path, 700)
            elif how == "gone":
                path.unlink()
            else:
                path.write_bytes(bytes(path.stat().st_size))

    batches = epoch(copy, between=change)
    early = [sample for batch in batches if batch.step <= 1 for sample, _ in batch.bad]
    late = {sample for batch in batches if batch.step > 1 for sample, _ in batch.bad}
    assert early == []
    hit = {sample for batch in batches if batch.step > 1 for sample in batch.samples.tolist() if shards.shard_of(sample) == 0}
    assert hit, "the test has something to meet"
    assert late == (hit if how != "gone" else set()), "a file that is open stays readable when its name is gone"


def test_an_index_that_does_not_belong(copy: Path, tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "o", {"ant": 20, "bee": 15}, seed=3), tmp_path / "other", shard_bytes=20_000, processes=1, progress=False)
    shutil.copy(tmp_path / "other/index.bin", copy / "index.bin")
    with pytest.raises(UserError, match=r"index.bin does not belong to the manifest.json beside it"):
        Shards.open(copy)


def test_a_whole_batch_of_damage(copy: Path) -> None:
    """All samples of a step are damaged: it still comes, at weight 0."""
    for path in copy.glob("*.tar"):
        path.unlink()
    batches = epoch(copy, world=2)
    assert len(batches) == 8
    assert all(torch.count_nonzero(batch.weights) == 0 for batch in batches)
    assert sum(len(batch.bad) for batch in batches) == 35


def test_too_little_memory_is_not_damage(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is masked and forgotten for it: it counts as one that cannot be read now, which ends a run whatever data.on_error is."""

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dtl.data.loading.loader.decode_into", full)
    (_, damaged), *_ = epoch(packed)[0].bad
    assert isinstance(damaged, UnreachableSample)
    assert damaged.reason.startswith("there is not enough memory to decode it (")
