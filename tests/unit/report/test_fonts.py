"""Names in scripts that matplotlib's own font lacks: drawn where a font is installed, numbered and listed where none is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from page_reader import Page
from PIL import Image, ImageDraw
from recipes import write_images
from report_runs import make_config, make_run

from dtl.report import fonts, make_report, style
from dtl.report.grids import fitting

SCISSORS, FORCEPS = "翘头剪", "止血钳"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of the machine, as the test fills them in."""
    found: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    known = list(font_manager.fontManager.ttflist)
    caches = (fonts._installed, fonts.font_of, font_manager.fontManager._findfont_cached)
    for cache in caches:
        cache.cache_clear()
    yield found
    # matplotlib keeps what it has been given, and the files go with their test.
    font_manager.fontManager.ttflist[:] = known
    for cache in caches:
        cache.cache_clear()


def han_font(file: Path) -> str:
    """A font of six characters, each a bar of another height."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    letters = SCISSORS + FORCEPS
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
    glyphs = {}
    for number, name in enumerate(names):
        pen = TTGlyphPen(None)
        height = 100 + 120 * number
        pen.moveTo((100, 0))
        for point in ((100, height), (800, height), (800, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Test Han", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=200)
    builder.setupPost()
    builder.save(file)
    return str(file)


def drawn(text: str) -> bytes:
    image = Image.new("L", (200, 30), 255)
    ImageDraw.Draw(image).text((2, 2), text, fill="black", font=fonts.GridFont())  # type: ignore[arg-type]
    return image.tobytes()


def test_names_are_drawn_in_a_font_that_has_them(installed: list[str], tmp_path: Path) -> None:
    assert drawn(SCISSORS) == drawn(FORCEPS)
    assert not fonts.covers(f"a {SCISSORS}")
    assert fonts.without_font([SCISSORS, "ants", "ümlaut", "कैंची", "가위", "✂️🦷", "a\nb", "\udcff"]) == [
        "Chinese (Han)", "Devanagari", "Hangul", "emoji and other symbols"
    ]  # fmt: skip
    (tmp_path / "no.ttf").write_bytes(b"no font")
    installed += [str(tmp_path / "no.ttf"), str(tmp_path / "gone.ttf"), han_font(tmp_path / "han.ttf")]
    fonts._installed.cache_clear()
    fonts.font_of.cache_clear()
    assert drawn(SCISSORS) != drawn(FORCEPS)
    assert fonts.covers(f"a {SCISSORS}")
    assert fonts.without_font([SCISSORS, "a"]) == []
    assert fonts.families([f"a {SCISSORS}"]) == ["DejaVu Sans", "Test Han"]
    assert fonts.families(["ants"]) == ["DejaVu Sans"]
    assert fitting(ImageDraw.Draw(Image.new("L", (1, 1))), SCISSORS * 20, 100).endswith("…")
    font = fonts.GridFont()
    assert font.getlength("ab" + SCISSORS) == pytest.approx(font.getlength("ab") + font.getlength(SCISSORS))


def test_plots_use_it_too(installed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def plot(name: str) -> np.ndarray:
        with style.plain([name]):
            figure = style.new_figure(300, 100, fit=False)
            figure.text(0.1, 0.5, name, weight="bold")
            style.save(figure, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            return np.asarray(image.convert("RGB"))

    assert (plot(SCISSORS) == plot(FORCEPS)).all()
    installed.append(han_font(tmp_path / "han.ttf"))
    fonts._installed.cache_clear()
    fonts.font_of.cache_clear()
    with caplog.at_level("WARNING"):  # matplotlib's findfont, of a font without a bold face
        assert (plot(SCISSORS) != plot(FORCEPS)).any()
    assert not caplog.records


@pytest.mark.parametrize("has_font", [True, False])
def test_a_report_of_such_classes(installed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_font: bool) -> None:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    if has_font:
        installed.append(han_font(tmp_path / "han.ttf"))
    classes = (SCISSORS, FORCEPS, "two\nlines")
    photos = write_images(tmp_path / "photos", dict.fromkeys(classes, 6))
    config = make_config("run", phases={"all": {"train": "all", "epochs": 1}}, train=str(photos), val_fraction=0.5)
    run = make_run(tmp_path / "run", config)
    logged: list[str] = []
    page = Page.read(make_report(run, log=logged.append))
    page.check_self_contained()
    for name in classes:
        assert " ".join(name.split()) in page.text
    assert {"confusion.png", "classes.png", "predictions.png"} <= {file.name for file in (run / "report").iterdir()}
    if has_font:
        assert logged == []
        assert "Classes that the plots number" not in page.text
    else:
        (line,) = logged
        assert "Chinese (Han)" in line
        assert "no installed font" in line
        assert f"Classes that the plots number in the plots class class 1 {min(SCISSORS, FORCEPS)} class 2 {max(SCISSORS, FORCEPS)}" in page.text
    assert json.loads((run / "model/model.json").read_text())["classes"] == sorted(classes, key=str.encode)


def test_without_a_home_matplotlib_has_its_cache_beside_the_run(tmp_path: Path) -> None:
    """A container with a bare user id: matplotlib printed two lines, and made a folder for each process."""
    code = "import os; os.access = lambda *_: False; from dtl.report import fonts; print(os.environ.get('MPLCONFIGDIR'))"
    for given, used in ((None, tmp_path / ".dtl-cache/matplotlib"), ("mine", "mine")):
        environment = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "DTL_CACHE")}
        environment |= {} if given is None else {"MPLCONFIGDIR": given}
        done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(used)
