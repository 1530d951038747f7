"""Keyed randomness: golden vectors, because the order of every run hangs on them, and properties."""

from __future__ import annotations

import numpy as np
import pytest

from dtl import keyed

# Written down once. A change here changes the order of the samples and the augmentation of every run that is being resumed.
KEYS = {
    (): 0x0,
    (0,): 0xE220A8397B1DCDAF,  # splitmix64's first output from state 0
    (1,): 0x910A2DEC89025CC1,
    (0, 0): 0xA706DD2F4D197E6F,
    ("a",): 0x4B13495810B022DF,
    ("crop.scale",): 0x665E5DF73A553355,
    (0, 1, "shards"): 0x850AA2F5C9651687,
    (1, 0, "shards"): 0xCB483E34077078D7,
    (-1,): 0xE4D971771B652C20,
}
PERMUTATIONS = {
    (0, 0): [6, 0, 2, 3, 1, 7, 5, 9, 4, 8],
    (0, 1): [9, 3, 7, 8, 5, 2, 1, 0, 6, 4],
    (1, 0): [7, 1, 6, 8, 0, 4, 2, 3, 5, 9],
    (1, 1): [9, 5, 3, 2, 0, 6, 4, 7, 1, 8],
    (2, 0): [8, 2, 5, 0, 7, 9, 1, 4, 3, 6],
    (2, 1): [3, 7, 5, 9, 2, 1, 0, 6, 4, 8],
}


@pytest.mark.parametrize("parts", KEYS)
def test_golden_keys(parts: tuple[int | str, ...]) -> None:
    assert int(keyed.key(*parts)) == KEYS[parts]


def test_golden_keys_of_items() -> None:
    found = keyed.keys([0, 1, 2, 2**32, 2**63], 7, "x")
    expected = [0xAF61E621BFDE799D, 0x71E91CE859C5AD39, 0xC9117CC3E169EB42, 0x5A98E9CFF89AAE39, 0x5203F8559955AD73]
    assert [int(value) for value in found] == expected


@pytest.mark.parametrize(("seed", "epoch"), PERMUTATIONS)
def test_golden_permutations(seed: int, epoch: int) -> None:
    assert keyed.permutation(10, seed, epoch, "shards").tolist() == PERMUTATIONS[seed, epoch]


def test_golden_uniform() -> None:
    expected = ["0x1.91c892c15e51ap-2", "0x1.ba9a06d425b36p-2", "0x1.091882bfbe020p-2"]
    assert [value.hex() for value in keyed.uniform([0, 1, 2], 0, 0, "flip").tolist()] == expected


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 255, 256, 257, 65_535, 65_536, 65_537])
def test_a_permutation_has_each_number_once(n: int) -> None:
    found = keyed.permutation(n, 3, "x")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(n))


def test_seed_and_epoch_do_not_add_up() -> None:
    assert keyed.permutation(100, 1, 0).tolist() != keyed.permutation(100, 0, 1).tolist()
    keys = {int(keyed.key(seed, epoch, "shards")) for seed in range(50) for epoch in range(50)}
    assert len(keys) == 2500


def test_words_and_integers_differ() -> None:
    parts = [("a",), (97,), ("ab",), ("a", "b"), ("", "ab"), ("ba",), (0,), ("",), (0, 0), (1, 2), (2, 1), (12,)]
    assert len({int(keyed.key(*part)) for part in parts}) == len(parts)


def test_items_are_independent_of_each_other() -> None:
    items = np.array([[5, 9], [1_000_000_007, 3]])
    found = keyed.uniform(items, 1, "y")
    assert found.shape == items.shape
    for position in np.ndindex(items.shape):
        assert found[position] == keyed.uniform([items[position]], 1, "y")[0]


@pytest.mark.parametrize("parts", [(0, 0, "flip"), (0, 1, "flip"), (7, 3, "crop.scale")])
def test_uniform_is_uniform(parts: tuple[int | str, ...]) -> None:
    values = keyed.uniform(np.arange(100_000), *parts)
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    # chi-square with 99 degrees of freedom: 148 is passed by chance once in 1,000
    assert ((counts - 1000) ** 2 / 1000).sum() < 148
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015


def test_operations_of_one_sample_are_independent() -> None:
    items = np.arange(100_000)
    first, second = keyed.uniform(items, 0, 0, "flip"), keyed.uniform(items, 0, 0, "crop.scale")
    later = keyed.uniform(items, 0, 1, "flip")
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first, later)[0, 1]) < 0.015
