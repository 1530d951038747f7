"""How the plots look: plain, few inks, and colours that people with any colour vision tell apart.

Plots are drawn for a width of NARROW pixels of a page, so that their text is still read at 340; what has a course is drawn WIDE
too, for wide windows. They are saved at about twice that, for sharp screens.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtl.errors import UserError, printable
from dtl.report.fonts import families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color Universal Design"; blue and vermilion also differ in brightness.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#1a1a1a"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, FAINT = "#5f5f5f", "#e3e3e3"
NARROW, WIDE = 460, 960  # pixels of the page
_PIXELS_PER_INCH = 100  # of the page
_SHARPNESS = 2.2  # pixels of the file for one of the page

_SETTINGS: Any = {
    "font.size": 8.6,  # points: 12 pixels of the page
    "axes.titlesize": 8.6,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "text.color": BLACK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 8.2,
    "legend.handlelength": 1.6,
    "text.parse_math": False,  # a class may be called "$5 bill"
    "figure.facecolor": "white",
}


@contextmanager
def plain(names: Iterable[str] = ()) -> Iterator[None]:
    """Everything drawn and saved inside looks as above, with fonts for `names`. Never touches pyplot, so the caller's own figures are left alone."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the report's plots need matplotlib ({error}); pip install matplotlib") from None
    with matplotlib.rc_context(_SETTINGS | {"font.family": families(names)}), warnings.catch_warnings(), _without_findfont():
        # A name may be in a script that no font here has: the report says so, and the page has the names as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@contextmanager
def _without_findfont() -> Iterator[None]:
    """matplotlib logs each font of the machine that has no bold face."""
    logger = logging.getLogger("matplotlib.font_manager")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def new_figure(width: int, height: int, *, fit: bool = True) -> Figure:
    """A figure of this many pixels of the page. `fit` makes room for all texts, which takes as long again as drawing them."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), layout="constrained" if fit else None)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(_PIXELS_PER_INCH * (_SHARPNESS if page_width(figure) < WIDE else 1.8))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    # Few inks: a palette of 256 colours looks the same and takes a third of the bytes.
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    Image.fromarray(pixels).convert("RGB").quantize(256).save(path, optimize=True)


def page_width(figure: Figure) -> int:
    return round(figure.get_figwidth() * _PIXELS_PER_INCH)


def lines_on(axes: Axes, axis: str = "y") -> None:
    axes.grid(axis=axis, color=FAINT, linewidth=0.7)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def as_percent(axes: Axes, axis: str = "y") -> None:
    from matplotlib.ticker import PercentFormatter

    (axes.yaxis if axis == "y" else axes.xaxis).set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))


def percent(share: float, decimals: int = 1) -> str:
    """0.983 -> 98.3 % with a space that no line breaks at; a dash for what is not known."""
    return "–" if share != share else f"{100 * share:.{decimals}f}\u00a0%"


def shorten(text: str, limit: int) -> str:
    """A name of others, or its beginning and an ellipsis, in at most `limit` characters of one line."""
    text = printable(text)
    return text if len(text) <= limit else text[: max(0, limit - 1)].rstrip() + "…"
