"""Samples as columns: counts, and a fingerprint that any change of a file changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtl.data.sources.base import Source, SourceBuilder


def made(*groups: dict[str, Any], classes: tuple[str, ...] = ("a", "b"), splits: tuple[str, ...] = ("train", "val")) -> Source:
    builder = SourceBuilder()
    for group in groups:
        builder.add(**group)
    return builder.build(kind="folder", root=Path("x"), classes=classes, split_names=splits, display_names={}, notes=())


ONE: dict[str, Any] = {"names": ["a/1", "a/2"], "label": 0, "split": 0, "sizes": [5, 6], "mtimes": [1, 2]}
TWO: dict[str, Any] = {"names": ["b/1"], "label": 1, "split": 1, "sizes": [7], "mtimes": [3]}


def test_counts_by_split_and_class() -> None:
    source = made(ONE, TWO)
    assert source.counts().tolist() == [[2, 0], [0, 1]]
    assert (source.num_samples, source.num_bytes, source.has_splits) == (3, 18, True)
    assert not made(ONE, splits=("all",)).has_splits
    assert made().counts().tolist() == [[0, 0], [0, 0]]


def test_every_change_of_a_file_changes_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [{"names": ["a/1", "a/3"]}, {"label": 1}, {"split": 1}, {"sizes": [5, 7]}, {"mtimes": [1, 3]}]
    found = {made({**ONE, **change}, TWO).fingerprint for change in ({}, *changes)}
    assert len(found | {made(ONE).fingerprint, made(ONE, TWO, classes=("a", "c")).fingerprint}) == len(changes) + 3
    assert made(ONE, TWO).fingerprint == made(ONE, TWO).fingerprint
