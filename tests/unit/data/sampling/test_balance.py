"""Class-balanced epochs: the quotas, the streams that go on from epoch to epoch, the same batches for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import image_folder

from dtl.config.models import AugmentConfig
from dtl.data.loading.loader import StepLoader
from dtl.data.packing.pack import pack
from dtl.data.sampling.balance import Balance, BalancedPlan, permuted, quotas
from dtl.data.sampling.class_members import ClassMembers
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import train_transform
from dtl.keyed import keys

BOTH: tuple[Balance, ...] = ("sqrt", "uniform")


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    """Labels of so many samples of each class, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def plan_of(labels: np.ndarray, num_classes: int, balance: Balance, *, epoch: int = 0, seed: int = 0, batch: int = 8, window: int = 65_536) -> BalancedPlan:
    return BalancedPlan(
        np.array([len(labels)]), seed=seed, epoch=epoch, global_batch_size=batch, window=window,
        balance=balance, members=ClassMembers.of_labels(labels, num_classes),
    )  # fmt: skip


counts_of = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30).filter(any), st.sampled_from(BOTH))
def test_quotas_are_the_nearest_integers_and_keep_the_epochs_length(counts: list[int], balance: Balance) -> None:
    found = quotas(counts, balance)
    assert found.sum() == sum(counts)
    weights = np.array([0.0 if not count else 1.0 if balance == "uniform" else count**0.5 for count in counts])
    assert (np.abs(found - sum(counts) * weights / weights.sum()) < 1 + 1e-6 * found).all()
    assert ((found > 0) == (np.array(counts) > 0)).all(), "no class is left out, and none without samples is drawn"


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(0, 5))
def test_a_permutation_of_any_size_place_by_place(size: int, number: int) -> None:
    stream = np.full(size, keys(number, "test"))
    found = permuted(np.arange(size), np.full(size, size), stream)
    assert sorted(found) == list(range(size))
    assert permuted(np.array([size // 2]), np.array([size]), stream[:1])[0] == found[size // 2]


def test_permutations_are_even() -> None:
    """Each of the 24 orders of 4 equally often; far places of a large class are moved apart."""
    streams = np.repeat(keys(np.arange(24_000), "even"), 4)
    orders = permuted(np.tile(np.arange(4), 24_000), np.full(96_000, 4), streams).reshape(-1, 4)
    _, times = np.unique(orders, axis=0, return_counts=True)
    assert len(times) == 24
    assert abs(times - 1000).max() < 150  # 4.7 standard deviations
    n = 10**9
    found = permuted(np.arange(5000), np.full(5000, n), np.full(5000, keys(1, "far")))
    assert np.abs(np.diff(found)).min() > 1000
    assert abs(found.mean() / n - 0.5) < 0.03
    assert len(np.unique(found // (n // 100))) == 100


@settings(max_examples=25)
@given(counts_of, st.sampled_from(BOTH), st.integers(8, 60), st.integers(1, 30), st.integers(0, 3))
def test_every_epoch_has_its_quotas_and_streams_go_on(counts: list[int], balance: Balance, window: int, batch: int, seed: int) -> None:
    labels = labels_of(counts)
    total = np.zeros(len(labels), np.int64)
    drawn: list[int] = []
    for epoch in range(3):
        plan = plan_of(labels, len(counts), balance, epoch=epoch, seed=seed, batch=batch, window=window)
        draws = plan.draws(np.arange(plan.num_samples))
        samples = draws % plan.num_samples
        assert len(samples) == len(labels)
        assert np.bincount(labels[samples], minlength=len(counts)).tolist() == plan.quotas.tolist()
        times = np.bincount(samples, minlength=len(labels))
        assert times.tolist() == plan.times().tolist()
        total += times
        for label in range(len(counts)):
            if counts[label]:
                assert np.ptp(total[labels == label]) <= 1, "all of a class before one of them again, over all epochs"
        drawn += draws.tolist()
    assert len(set(drawn)) == len(drawn), "a sample that comes again has another key for its augmentation"


@settings(max_examples=30)
@given(counts_of, st.sampled_from(BOTH), st.integers(1, 20), st.sampled_from([1, 2, 3, 7]), st.sampled_from([None, 1, 3]), st.booleans())
def test_any_number_of_ranks_gets_the_same_batches(counts: list[int], balance: Balance, batch: int, ranks: int, micro: int | None, pairs: bool) -> None:
    plan = plan_of(labels_of(counts), len(counts), balance, epoch=2, batch=batch, window=16)
    layout = RankLayout.for_plan(plan, num_ranks=ranks, micro_batch_size=micro, pairs=pairs)
    for step in range(plan.num_steps):
        slots = {}
        for rank in range(ranks):
            for one in layout.micro_batches(plan, step, rank):
                assert one.draws is not None
                assert (one.draws % plan.num_samples == one.samples).all()
                slots |= {int(slot): int(sample) for slot, sample in zip(one.slots, one.samples) if slot >= 0}
        assert [slots[i] for i in range(len(slots))] == plan.step_samples(step).tolist()


def test_positions_can_be_asked_for_in_any_order_and_windows_are_balanced_too() -> None:
    counts = [2000, 500, 30, 1, 0, 700]
    labels = labels_of(counts)
    plan = plan_of(labels, len(counts), "sqrt", epoch=3, window=200)
    everything = plan.samples(np.arange(len(labels)))
    for positions in ([3000, 0, 199, 200, 201, 1999], list(range(3000, 100, -37))):
        assert plan.samples(positions).tolist() == everything[positions].tolist()
    found = np.array([np.bincount(labels[part], minlength=6) for part in np.array_split(everything, 16)])
    assert (np.abs(found - plan.quotas / 16) < 12).all(), "no stretch of the epoch is without its share"
    assert found[:, 3].sum() == plan.quotas[3]


def test_uniform_draws_all_classes_alike_and_sqrt_lies_between() -> None:
    counts = [900, 90, 9, 1]
    assert quotas(counts, "uniform").tolist() == [250] * 4
    assert quotas(counts, "sqrt").tolist() == [690, 218, 69, 23]  # in proportion to 30 : 9.49 : 3 : 1
    assert quotas([4, 4, 4, 4], "sqrt").tolist() == quotas([4, 4, 4, 4], "uniform").tolist() == [4] * 4


@pytest.mark.parametrize("balance", BOTH)
def test_a_set_that_is_balanced_already_comes_once_an_epoch(balance: Balance) -> None:
    labels = labels_of([50, 50, 50])
    for epoch in range(3):
        samples = plan_of(labels, 3, balance, epoch=epoch, window=32).samples(np.arange(150))
        assert sorted(samples) == list(range(150))


# Written once: a change of any of these numbers breaks the resume of runs that were started with it.
GOLDEN: dict[tuple[str, int, int], list[int]] = {
    ("sqrt", 0, 0): [12, 16, 24, 25, 38, 46, 31, 20, 22, 9, 49, 50, 34, 21],
    ("sqrt", 0, 1): [36, 47, 8, 11, 2, 31, 38, 30, 6, 39, 32, 2, 10, 54],
    ("sqrt", 3, 5): [18, 46, 9, 23, 20, 40, 27, 26, 12, 1, 52, 45, 28, 11],
    ("uniform", 0, 0): [20, 9, 38, 50, 59, 46, 24, 16, 57, 34, 49, 22, 31, 21],
    ("uniform", 0, 1): [8, 19, 54, 24, 7, 30, 59, 45, 2, 2, 11, 42, 58, 52],
    ("uniform", 3, 5): [0, 39, 48, 30, 37, 43, 34, 57, 47, 22, 3, 10, 45, 53],
}


def test_golden_orders() -> None:
    for (balance, seed, epoch), expected in GOLDEN.items():
        plan = plan_of(np.arange(60) % 7 % 4, 4, balance, seed=seed, epoch=epoch, window=16)  # type: ignore[arg-type]
        assert plan.samples(np.arange(14)).tolist() == expected, (balance, seed, epoch)
    assert len(GOLDEN) == 6


# --- the file of members, and the loader


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 30, "bee": 6, "cow": 2})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=20_000, processes=1, progress=False)
    return folder


def test_a_sample_that_comes_again_is_augmented_anew(packed: Path, tmp_path: Path) -> None:
    shards = Shards.open(packed)
    plan = BalancedPlan(
        shards.shard_sizes, seed=0, epoch=0, global_batch_size=38, balance="uniform", members=ClassMembers.of_shards(shards, cache_dir=tmp_path)
    )
    transform = train_transform(image_size=8, augment=AugmentConfig(preset="imagenet"))
    views: dict[int, set[bytes]] = {}
    for ranks in (1, 3):
        layout = RankLayout.for_plan(plan, num_ranks=ranks, micro_batch_size=None)
        for rank in range(ranks):
            loader = StepLoader(shards, transform, plans=lambda epoch: plan, layout=layout, rank=rank, image_size=8, seed=0, workers=0)
            for batch in next(iter(loader.steps(0, 0, 1))):
                assert not batch.bad
                for i in np.flatnonzero(batch.slots.numpy() >= 0):
                    views.setdefault(int(batch.samples[i]), set()).add(batch.images[i].contiguous().numpy().tobytes())
    times = plan.times()
    assert max(times) >= 6
    assert {sample: len(found) for sample, found in views.items()} == {sample: times[sample] for sample in np.flatnonzero(times).tolist()}


def test_it_is_another_plan_than_the_plain_one() -> None:
    labels = labels_of([20, 20])
    plain = EpochPlan(np.array([40]), seed=0, epoch=0, global_batch_size=8)
    assert plain.draws(np.arange(40)).tolist() == plain.samples(np.arange(40)).tolist()
    assert plan_of(labels, 2, "uniform").samples(np.arange(40)).tolist() != plain.samples(np.arange(40)).tolist()
