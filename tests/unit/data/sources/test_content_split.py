"""The split by content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtl.data.sources.content_split import folds_by_content, split_by_content
from dtl.errors import UserError


def _hashes(labels: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, len(labels), np.uint64, endpoint=False)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(2, 60), min_size=2, max_size=6), fraction=st.floats(0.02, 0.9), seed=st.integers(0, 1000))
def test_split_by_content_is_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    val = split_by_content(_hashes(labels, seed), labels, fraction, num_classes=len(counts))
    for label, count in enumerate(counts):
        chosen = int(val[labels == label].sum())
        assert 1 <= chosen <= count - 1
        assert abs(chosen - min(max(count * fraction, 1), count - 1)) <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), added=st.integers(1, 20))
def test_added_images_move_few_others(seed: int, added: int) -> None:
    labels = np.repeat(np.arange(3), 100).astype(np.int32)
    hashes = _hashes(np.zeros(300 + added), seed)
    more = np.concatenate([labels, np.full(added, 1, np.int32)])
    before = split_by_content(hashes[:300], labels, 0.2, num_classes=3)
    after = split_by_content(hashes, more, 0.2, num_classes=3)[:300]
    assert (before != after).sum() <= added + 3


def test_copies_go_together_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    contents, labels = rng.integers(0, 50, 400), rng.integers(0, 4, 400).astype(np.int32)  # copies, also under other labels
    hashes = _hashes(np.zeros(50), 1)[contents]
    val = split_by_content(hashes, labels, 0.3, num_classes=4)
    for content in range(50):
        assert len(set(val[contents == content].tolist())) <= 1
    assert 0.25 < val.mean() < 0.35
    order = rng.permutation(400)
    np.testing.assert_array_equal(split_by_content(hashes[order], labels[order], 0.3, num_classes=4), val[order])


# ---- folds


@settings(max_examples=80)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), folds=st.integers(2, 9), seed=st.integers(0, 1000))
def test_folds_differ_by_one_image_at_most(counts: list[int], folds: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    names, hashes = [f"class{label}" for label in range(len(counts))], _hashes(labels, seed)
    few = [label for label, count in enumerate(counts) if 0 < count < folds]
    if few:
        with pytest.raises(
            UserError, match=rf"{folds} folds need images of each class in each of them, but class 'class{few[0]}' has {counts[few[0]]} different"
        ):
            folds_by_content(hashes, labels, folds, seed=seed, classes=names)
        return
    found = folds_by_content(hashes, labels, folds, seed=seed, classes=names)
    assert set(found.tolist()) <= set(range(folds)), "each image is in one fold"
    for chosen in (*(labels == label for label in range(len(counts))), np.ones(len(labels), bool)):
        sizes = np.bincount(found[chosen], minlength=folds)
        assert sizes.max() - sizes.min() <= 1
    order = np.random.default_rng(seed).permutation(len(labels))
    np.testing.assert_array_equal(folds_by_content(hashes[order], labels[order], folds, seed=seed, classes=names), found[order])


@settings(max_examples=40)
@given(contents=st.integers(30, 80), images=st.integers(60, 200), folds=st.integers(2, 5), seed=st.integers(0, 1000))
def test_copies_are_in_one_fold(contents: int, images: int, folds: int, seed: int) -> None:
    content = np.r_[np.arange(contents), np.random.default_rng(seed).integers(0, contents, images)]  # each once, and some more often
    labels = ((content + np.r_[np.zeros(contents, int), np.arange(images) == 0]) % 2).astype(np.int32)  # one of them under another label, too
    found = folds_by_content(_hashes(np.zeros(contents), seed)[content], labels, folds, seed=0, classes=("a", "b"))
    assert all(len(set(found[content == one].tolist())) == 1 for one in range(contents))
    assert set(found.tolist()) == set(range(folds))


def test_another_seed_gives_other_folds() -> None:
    labels = np.repeat(np.arange(2), 50).astype(np.int32)
    first, second = (folds_by_content(_hashes(labels, 0), labels, 5, seed=seed, classes=("a", "b")) for seed in (0, 1))
    assert 0.05 < (first == second).mean() < 0.4
