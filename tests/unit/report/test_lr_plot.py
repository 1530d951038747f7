"""The picture of a learning rate range test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dtl.report import lr_plot
from dtl.report.lr_plot import save_lr_plot

LRS = [1e-4, 1e-3, 1e-2, 1e-1]


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    """The axes that were saved."""
    kept: list[Any] = []
    save = lr_plot.save
    monkeypatch.setattr(lr_plot, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    save_lr_plot(path, phase="head", **{"lrs": LRS, "losses": [2.0, 1.5, 1.0, 9.0], "smoothed": [2.0, 1.8, 1.5, 4.0], "suggestion": None, **values})
    with Image.open(path) as image:
        assert image.format == "PNG"
    return kept[0].axes[0]


def test_the_suggested_rate_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path / "plot.png", monkeypatch, suggestion=0.0123)
    assert axes.get_xscale() == "log"
    assert "head" in axes.get_title(loc="left")
    assert [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2] == [[0.0123, 0.0123]]
    assert [text.get_text().strip() for text in axes.texts] == ["0.012"]


def test_without_a_suggestion_nothing_is_marked_and_a_diverging_end_hides_no_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path / "plot.png", monkeypatch)
    assert not axes.texts
    assert len(axes.lines) == 2
    low, high = axes.get_ylim()
    assert low < 1.5
    assert 2.0 < high < 4.0, "the fall fills the picture, not the loss that blew up"


@pytest.mark.parametrize("number", [0, 1])
def test_a_test_of_a_step_or_none_is_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    axes = drawn(tmp_path / "plot.png", monkeypatch, lrs=LRS[:number], losses=[2.0][:number], smoothed=[2.0][:number])
    assert [len(line.get_xdata()) for line in axes.lines] == [number, number]
