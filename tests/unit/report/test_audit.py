"""The page of an audit; tests/unit/commands/test_audit.py makes one of real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from page_reader import Page

from dtl.errors import UserError
from dtl.report.audit import Shown, make_audit_page


def shown(image: int) -> Shown:
    pixels = None if image == 3 else np.full((64, 64, 3), 40 * image, np.uint8)
    return Shown(("train", "val")[image % 2], f"<b>{image}</b>.jpg", "ants", pixels)


def test_what_it_shows(tmp_path: Path) -> None:
    kinds = [
        ("same photo", "twins: the same photo", 60, [(0, 1, 0.987, ""), (2, 3, 0.9, "")]),
        ("same scene", "twins: the same scene", 0, []),
        ("label", "labels that are probably wrong", 1, [(4, -1, 0.012, "bees (97%)")]),
    ]
    page = Page.read(make_audit_page(tmp_path / "audit", "photos", [("Network", "none")], kinds, shown, ["a note"]))
    page.check_self_contained()
    assert len(page.images) == 5
    assert page.text.count("0.987") == 1, "once for a pair"
    for words in ("<b>3</b>.jpg", "agreement 0.987", "The first 2 of 60 findings", "bees (97%)", "a probability of 1.2 %", "a note"):
        assert words in page.text, words
    make_audit_page(tmp_path / "audit", "photos", [], kinds, shown, [])  # again, in place of it


def test_a_folder_of_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a report made by dtl"):
        make_audit_page(tmp_path, "photos", [], [], shown, [])
