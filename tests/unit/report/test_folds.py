"""The page of a cross-validation; tests/unit/commands/test_folds.py makes one of real folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_reader import Page

from dtl.errors import UserError
from dtl.report.folds import make_folds_page

METRICS: dict[str, Any] = {"top1": 0.5, "loss": 0.7, "balanced_accuracy": 0.5, "macro_f1": 0.4, "auroc": None}
VALUES: dict[str, Any] = {
    **METRICS, **{f"{key}_interval": (0.1, 0.9) for key in METRICS}, "auroc_interval": None, "num_samples": 4, "correct": 2, "folds": 2, "seed": 0,
    "num_groups": 3, "refit": None, "mean": METRICS, "range": {"top1": [0.25, 0.75]}, "per_class": [{"name": "<b>ant</b>"}, {"name": "\u8702"}],
    "per_fold": [{"fold": number, "num_samples": 2, "correct": 1, "top1_interval": None, **METRICS} for number in (1, 2)],
}  # fmt: skip


def test_what_it_shows(tmp_path: Path) -> None:
    page = Page.read(make_folds_page(tmp_path / "x-folds", VALUES, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])))
    page.check_self_contained()
    assert len(page.images) == 2
    assert "2 (3 groups, each in one fold), seed 0" in page.text
    assert "50.00 % on average, 25.00 % to 75.00 %" in page.text
    assert "2 of 4 images" in page.text
    assert "not trained (--refit)" in page.text
    make_folds_page(tmp_path / "x-folds", VALUES, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))  # again, in place of it


def test_a_folder_of_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a report made by dtl"):
        make_folds_page(tmp_path, VALUES, np.array([0]), np.array([0]))
