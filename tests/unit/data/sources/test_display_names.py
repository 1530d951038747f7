"""Display names of classes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.data.sources.base import Source
from dtl.data.sources.open import open_source
from dtl.errors import UserError


def notes(source: Source) -> str:
    return "\n".join(source.notes)


@pytest.mark.parametrize("where", ["train", ".", ".."])
@pytest.mark.parametrize("name", ["cat_to_name.json", "class_names.json", "names.json"])
def test_display_names_beside_or_above(tmp_path: Path, where: str, name: str) -> None:
    root = tmp_path / "flowers"
    image_folder(root / "train", {"1": 1, "2": 1})
    image_folder(root / "val", {"1": 1, "2": 1})
    (root / where / name).write_text(json.dumps({"1": "pink primrose", "2": "orchid", "99": "unused"}))
    source = open_source(root)
    assert source.display_names == {"1": "pink primrose", "2": "orchid"}
    assert f"display names from {os.path.normpath(root / where / name)}" in notes(source)


def test_display_names_by_option(tmp_path: Path) -> None:
    image_folder(tmp_path / "p", {"1": 1, "2": 1})
    file = tmp_path / "shown.json"
    file.write_text('{"1": "one"}')
    assert open_source(tmp_path / "p", names=file).display_names == {"1": "one"}
    for text, message in [('{"x": "y"}', "names none of the classes"), ("[1]", "is not a JSON object"), ("{", "not valid JSON")]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "p", names=file)
    with pytest.raises(UserError, match="does not exist; it should be a JSON file"):
        open_source(tmp_path / "p", names=tmp_path / "no.json")


def test_a_broken_file_of_names_is_told_not_obeyed(tmp_path: Path) -> None:
    image_folder(tmp_path / "p", {"1": 1, "2": 1})
    (tmp_path / "p" / "names.json").write_text("{")
    source = open_source(tmp_path / "p")
    assert source.display_names == {}
    assert "display names not used" in notes(source)
