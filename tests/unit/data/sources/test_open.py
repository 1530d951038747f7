"""What is no source at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.data.sources.open import open_source
from dtl.errors import UserError


def test_missing_sources(tmp_path: Path) -> None:
    image_folder(tmp_path / "hymenoptera/train", {"a": 1, "b": 1})
    (tmp_path / "link").symlink_to(tmp_path / "away")
    for name, message in [
        ("hymenoptra", f"hymenoptra does not exist; did you mean '{tmp_path}/hymenoptera'?"),
        ("hymenoptra/trian", f"trian does not exist .nor does the folder .*; did you mean '{tmp_path}/hymenoptera/train'?"),
        ("zzz", "zzz does not exist; give a folder of images"),
        ("no/such", r"does not exist \(nor does the folder"),
        ("link", "is a link to .*away, which does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)
