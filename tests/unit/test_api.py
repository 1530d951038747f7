"""What notebooks use: quick to import, and the same loader as training's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dtl


def test_every_public_name_is_there() -> None:
    for name in dtl.__all__:
        assert getattr(dtl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dtl.nothing  # noqa: B018


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_every_sample_once_an_epoch(tmp_path: Path, workers: int) -> None:
    loader = dtl.build_loader("digits", image_size=16, batch_size=100, workers=workers, seed=3, augment=None)
    labels, total = [], 0
    for images, label, weights in loader:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 16, 16)
        assert label.dtype == torch.int64
        assert len(images) == len(label) == len(weights) <= 100
        total += int(weights.sum())
        labels += label[weights > 0].tolist()
    assert total == 1437 == len(labels)
    assert len(loader) == 15
    assert [labels.count(k) for k in range(10)] == list(loader.shards.manifest.class_counts)


def test_ranks_share_the_epoch_and_workers_change_nothing() -> None:
    whole = [labels for _, labels, _ in dtl.build_loader("digits", "val", image_size=8, batch_size=50, workers=0)]
    parts = [
        [labels[weights > 0] for _, labels, weights in dtl.build_loader("digits", "val", image_size=8, batch_size=50, workers=w, rank=r, world_size=3)]
        for r, w in ((0, 0), (1, 2), (2, 1))
    ]
    for step, labels in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), labels)


def test_an_epoch_is_another_order_and_the_same_again() -> None:
    loader = dtl.build_loader("digits", image_size=8, batch_size=200, workers=0)
    first = next(iter(loader))
    again = next(iter(loader))
    loader.epoch = 1
    other = next(iter(loader))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])


def test_a_wrong_split_or_source_is_told() -> None:
    with pytest.raises(dtl.UserError, match="train or val"):
        dtl.build_loader("digits", "training")
    with pytest.raises(dtl.UserError, match="nowhere"):
        dtl.build_loader("nowhere")
