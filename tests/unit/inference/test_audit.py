"""The parts of an audit; tests/unit/commands/test_audit.py runs it whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtl.data.near import Pairs, near_pairs
from dtl.errors import UserError
from dtl.inference import audit
from dtl.inference.audit import _alike, _joined, _Rows, _Stacked


def test_images_that_pairs_connect_are_one_group() -> None:
    assert _joined(7, [(1, 2), (5, 6), (2, 5)]).tolist() == [0, 1, 1, 3, 4, 1, 1]
    assert _joined(3, []).tolist() == [0, 1, 2]


def test_features_of_several_splits_are_one_array() -> None:
    draw = np.random.default_rng(0)
    parts = [draw.random((3, 4)).astype(np.float32), draw.random((5, 2, 2)).astype(np.float32)]
    stacked = _Stacked(parts, np.array([0, 3, 8]))
    whole = np.concatenate([part.reshape(len(part), -1) for part in parts])
    assert stacked.shape == whole.shape
    assert np.array_equal(stacked[1:6], whole[1:6])
    assert np.array_equal(stacked[np.array([7, 0, 4])], whole[[7, 0, 4]])
    some = _Rows(stacked, np.array([0, 2, 5, 7]))
    assert np.array_equal(some[1:], whole[[2, 5, 7]])
    found, expected = near_pairs(some, 0.5), near_pairs(whole[[0, 2, 5, 7]], 0.5)
    assert np.array_equal(found.cosine, expected.cosine)


def on_ranks(world: int, thumbs: Any) -> tuple[Pairs, float]:
    """Each rank is a thread; all come to the same."""
    gate, given = threading.Barrier(world), [None] * world

    def gather(rank: int, value: Any) -> list[Any]:
        given[rank] = value
        gate.wait()
        found = list(given)
        gate.wait()
        return found

    ranks = [
        SimpleNamespace(rank=rank, world_size=world, together=lambda _: nullcontext(), gather=lambda one, rank=rank: gather(rank, one)) for rank in range(world)
    ]
    with ThreadPoolExecutor(world) as pool:
        ended = list(pool.map(lambda rank: _alike(thumbs, rank), ranks))
    assert all(least == ended[0][1] and np.array_equal(pairs.cosine, ended[0][0].cosine) for pairs, least in ended)
    return ended[0]


def test_the_limit_of_pairs_is_of_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many images look alike that one process raises the threshold, or gives up: two, each with half of the pairs, do the same."""
    draw = np.random.default_rng(0)
    thumbs = (draw.normal(size=64) + 0.35 * draw.normal(size=(60, 64))).astype(np.float32)
    monkeypatch.setattr("dtl.data.near._BLOCK", 16)
    thumbs[20:] = draw.normal(size=64) + 0.15 * draw.normal(size=(40, 64))
    for most, expected in ((10_000, 0.85), (1_800, 0.92)):
        monkeypatch.setattr(audit, "MOST_PAIRS", most)
        one, two = on_ranks(1, thumbs), on_ranks(2, thumbs)
        assert one[1] == two[1] == expected
        for name in ("first", "second", "cosine"):
            assert np.array_equal(getattr(one[0], name), getattr(two[0], name))
    thumbs[:] = thumbs[0]
    for world in (1, 2):
        with pytest.raises(UserError, match="more than 1,800 pairs of images are almost the same picture"):
            on_ranks(world, thumbs)


def test_a_class_is_called_as_actions_take_it_and_as_people_do() -> None:
    manifest = SimpleNamespace(display_names={"17": "purple coneflower", "ants": "ants"})
    shards = SimpleNamespace(num_samples=4, labels=np.array([0, 1, 2, 3]), classes=("17", "ants", "8"), manifest=manifest)
    found = audit.Audit(audit.Images({"train": shards}), [], [])  # type: ignore[dict-item]
    assert [found.label(image) for image in range(4)] == ["17 (purple coneflower)", "ants", "8", "?"]
