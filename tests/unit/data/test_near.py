"""Near pairs: exactly those of all products, however they are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtl.data import near
from dtl.data.near import Pairs, near_pairs, scene_pairs, whitened
from dtl.errors import UserError


def every_pair(features: npt.NDArray[np.float32], threshold: float) -> set[tuple[int, int]]:
    wide = features.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    first, second = np.nonzero(np.triu(unit @ unit.T >= threshold, 1))
    return set(zip(first.tolist(), second.tolist()))


def places(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.first.tolist(), pairs.second.tolist()))


def like_features(rows: int, width: int, *, seed: int, noise: float, twins: int) -> npt.NDArray[np.float32]:
    """As a network gives them: of few directions and some noise, none negative, with rows that are almost another one."""
    draw = np.random.default_rng(seed)
    found = np.maximum(draw.normal(size=(rows, 6)) @ draw.normal(size=(6, width)) + noise * draw.normal(size=(rows, width)) + 0.2, 0)
    for _ in range(twins if rows > 1 else 0):
        one, other = draw.choice(rows, 2, replace=False)
        found[other] = found[one] * draw.uniform(0.3, 3) + draw.uniform(0, 0.4) * np.abs(draw.normal(size=width)) * found[one].mean()
    return found.astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 120),
    width=st.sampled_from([1, 3, 40, 96]),
    seed=st.integers(0, 2**32 - 1),
    noise=st.floats(0, 3),
    twins=st.integers(0, 30),
    threshold=st.floats(0.05, 0.999),
    block=st.sampled_from([7, 32, 64]),
)
def test_no_pair_is_lost_and_none_is_added(rows: int, width: int, seed: int, noise: float, twins: int, threshold: float, block: int) -> None:
    features = like_features(rows, width, seed=seed, noise=noise, twins=twins)
    with pytest.MonkeyPatch.context() as patch:  # so that a few rows are many blocks, and are projected
        patch.setattr(near, "_BLOCK", block)
        patch.setattr(near, "_EXACT", 0.01)
        patch.setattr(near, "_NUMBERS", (2, 8, 32))
        found = near_pairs(features, threshold)
        shares = [near_pairs(features, threshold, share=(rank, 2)) for rank in range(2)]
    unsure = every_pair(features, threshold + 1e-9) ^ every_pair(features, threshold - 1e-9)
    assert set(places(found)) - unsure == every_pair(features, threshold) - unsure
    assert places(found) == sorted(places(found))
    both = Pairs.together(shares)
    assert places(both) == places(found)
    assert np.array_equal(both.cosine, found.cosine)


def test_many_rows_are_projected_and_the_pairs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = like_features(1500, 200, seed=3, noise=0.5, twins=60)
    whole = near_pairs(features, 0.97)
    monkeypatch.setattr(near, "_BLOCK", 256)
    assert near._projected(features, near._norms(features), 0.97) is not None
    cut = near_pairs(features, 0.97)
    assert len(whole) > 40
    assert places(cut) == places(whole)
    assert np.array_equal(cut.cosine, whole.cosine)


def test_rows_without_a_direction_are_in_no_pair() -> None:
    features = np.ones((6, 4), np.float32)
    features[1], features[3, 0], features[4, 1] = 0, np.nan, np.inf
    assert places(near_pairs(features, 0.5)) == [(0, 2), (0, 5), (2, 5)]


def test_a_set_of_one_image_again_and_again_ends_in_a_line() -> None:
    with pytest.raises(UserError, match=r"more than 1,000 pairs of images have a cosine of 0.9 or more: raise the threshold"):
        near_pairs(np.ones((100, 3), np.float32), 0.9, most=1000)


def test_what_all_images_share_is_not_what_twins_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with photos of one kind: every pair points the same way, and most of what differs lies along a few directions."""
    draw = np.random.default_rng(0)
    features = (5 + 2 * draw.normal(size=(300, 80)) * np.arange(1, 81) ** -0.7).astype(np.float32)
    features[7] = features[200] + 0.03 * draw.normal(size=80)
    features[8] = np.nan
    assert len(near_pairs(features, 0.95)) > 1000
    found = scene_pairs(features, 0.7)
    assert places(found) == [(7, 200)]
    monkeypatch.setattr(near, "_IN_MEMORY", 0)
    monkeypatch.setattr(near, "_BLOCK", 64)
    again = scene_pairs(features, 0.7, scratch=tmp_path)
    assert places(again) == places(found)
    assert again.cosine == pytest.approx(found.cosine, abs=1e-6)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(near, "_WIDEST", 40)
    assert whitened(features).shape == (300, 40)
    assert (7, 200) in places(scene_pairs(features, 0.5))


def test_images_that_a_network_does_not_tell_apart_are_no_twins() -> None:
    assert len(scene_pairs(np.full((50, 8), 3.3, np.float32))) == len(scene_pairs(np.full((5, 8), np.nan, np.float32))) == 0
    assert len(scene_pairs(np.zeros((0, 8), np.float32))) == len(scene_pairs(np.ones((1, 8), np.float32))) == 0


def test_the_limit_is_of_all_shares_together() -> None:
    shares = [near_pairs(np.ones((100, 3), np.float32), 0.9, share=(0, 1), most=4950)] * 2
    with pytest.raises(UserError, match=r"more than 5,000 pairs of images have a cosine of 0\.9 or more: raise the threshold"):
        Pairs.together(shares, threshold=0.9, most=5000)
