"""How plots look: settings that leave the caller's alone, figures of so many pixels, short words."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dtl.errors import UserError
from dtl.report import style


def test_settings_hold_inside_only() -> None:
    before = dict(matplotlib.rcParams)
    with style.plain():
        assert matplotlib.rcParams["text.parse_math"] is False
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn("Glyph 4 missing from font", UserWarning, stacklevel=1)
        assert not seen
    assert dict(matplotlib.rcParams) == before


def test_settings_end_with_an_error_too() -> None:
    before = dict(matplotlib.rcParams)
    with pytest.raises(KeyError), style.plain():
        raise KeyError
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"the report's plots need matplotlib \(.*\); pip install matplotlib"), style.plain():
        pass


@pytest.mark.parametrize(("width", "pixels"), [(style.NARROW, 1012), (style.WIDE, 1728)])
def test_a_figure_is_saved_sharper_than_the_page(tmp_path: Path, width: int, pixels: int) -> None:
    figure = style.new_figure(width, 100, fit=False)
    assert style.page_width(figure) == width
    style.save(figure, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert (image.width, image.mode) == (pixels, "P")


def test_axes_in_percent() -> None:
    axes = Figure().subplots()
    style.as_percent(axes)
    style.as_percent(axes, "x")
    style.lines_on(axes)
    assert axes.yaxis.get_major_formatter()(0.5) == axes.xaxis.get_major_formatter()(0.5)
    assert axes.yaxis.get_major_formatter()(0.5).endswith(" %")
    assert axes.get_ygridlines()[0].get_visible()
    assert not axes.get_xgridlines()[0].get_visible()


def test_numbers_and_words_are_short() -> None:
    assert style.percent(0.98349) == "98.3\u00a0%"
    assert style.percent(1.0, 2) == "100.00\u00a0%"
    assert style.percent(float("nan")) == "–"
    assert style.shorten("flowers", 7) == "flowers"
    assert style.shorten("two words", 5) == "two…", "no space before the ellipsis"
    assert style.shorten("flowers", 1) == "…"


def test_curves_can_be_told_apart() -> None:
    assert len(set(style.CYCLE)) == len(set(style.MARKERS)) == len(style.CYCLE)
