"""Where class names come from."""

from __future__ import annotations

from pathlib import Path

import pytest


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
    from dtl.checkpoint.transfer.source.class_names import read_class_names

    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "photos" / "ants").mkdir(parents=True, exist_ok=True)
    top = tmp_path / name.split("/")[0]
    assert read_class_names(top, "classes") == ["ants", "bees"]
