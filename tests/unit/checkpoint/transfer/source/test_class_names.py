"""Where class names come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtl.checkpoint.transfer.source.class_names import read_class_names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "ants\nbees\n"),
        ("c.json", '["ants", "bees"]'),
        ("c.json", '{"id2label": {"1": "bees", "0": "ants"}}'),
        ("c.yaml", "classes: [ants, bees]\n"),
        ("run/model/model.json", '{"classes": ["ants", "bees"]}'),
        ("photos/bees/x.jpg", ""),
    ],
)
def test_where_class_names_are_read_from(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "photos" / "ants").mkdir(parents=True, exist_ok=True)
    top = tmp_path / name.split("/")[0]
    assert read_class_names(top, "classes") == ["ants", "bees"]


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("Train", "Test")])
@pytest.mark.parametrize("packed", [True, False])
def test_splits_are_no_classes(tmp_path: Path, train: str, val: str, packed: bool) -> None:
    for split in (train, val):
        for name in ("ants", "bees"):
            (tmp_path / split / name).mkdir(parents=True)
        if packed:
            (tmp_path / split / "manifest.json").write_text(json.dumps({"classes": ["ants", "bees"]}), encoding="utf-8")
    assert read_class_names(tmp_path, "source_classes") == ["ants", "bees"]
