"""Fonts for names in any script: the one that comes with matplotlib, and for what it lacks those that are installed on this machine.

A browser looks for fonts by itself, so the page's text needs none of this; the plots and grids do.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.data.remote.address import default_cache_dir, has_home
from dtl.errors import printable

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

if "MPLCONFIGDIR" not in os.environ and not has_home():
    # matplotlib would make a folder for each process, and print two lines about it. It reads this when it is imported.
    os.environ["MPLCONFIGDIR"] = str(default_cache_dir() / "matplotlib")

FAMILY = "DejaVu Sans"
_SIZE = 14  # pixels, of grids
# Of a family the plain face is tried first; of all families those without serifs, as ours.
_LESS_PLAIN = ("bold", "black", "italic", "oblique", "light", "thin", "medium", "condensed", "mono", "serif")
# Joiners and selectors have no picture of their own, bytes that are not UTF-8 (surrogates) have no character.
_WITHOUT_PICTURE = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp"))


def families(texts: Iterable[str]) -> list[str]:
    """For matplotlib's `font.family`: its own font, then those that have what it lacks of `texts`."""
    found = [name for path in _needed(texts) if (name := _family(path)) is not None]
    return list(dict.fromkeys([FAMILY, *found]))


def covers(text: str) -> bool:
    """Whether each character has a font."""
    return all(font_of(letter) is not None for letter in _pictures(text))


def without_font(texts: Iterable[str]) -> list[str]:
    """The scripts of `texts` that no font here has, in words."""
    return sorted({_script(letter) for letter in {one for text in texts for one in _pictures(text)} if font_of(letter) is None})


class GridFont:
    """A font for Pillow that takes each character from the first font that has it. It has what `ImageDraw.text` and `.textlength` ask of a font."""

    def getname(self) -> tuple[str | None, str | None]:
        """Of the font that is looked into first."""
        return _sized(_own()).getname()

    def getlength(self, text: str, *_: object) -> float:
        """Of one line, in pixels."""
        return sum(_sized(path).getlength(part) for path, part in _runs(text))

    def getmask(self, text: str) -> Any:
        """The line as Pillow's core has images, one byte for each pixel."""
        from PIL import Image, ImageDraw

        parts = [(_sized(path), part) for path, part in _runs(text)]
        up, down = (max([metric[side] for metric in (font.getmetrics() for font, _ in parts)], default=0) for side in (0, 1))
        baseline = _sized(_own()).getmetrics()[0]
        sheet = Image.new("L", (math.ceil(self.getlength(text)) + 1, max(up, baseline) + down))
        draw, left = ImageDraw.Draw(sheet), 0.0
        for font, part in parts:
            draw.text((left, baseline), part, fill=255, font=font, anchor="ls")
            left += font.getlength(part)
        return sheet.im


@cache
def _sized(path: Path) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(str(path), _SIZE)


@cache
def font_of(letter: str) -> Path | None:
    """The first font that has the character; None where none has."""
    return next((path for path in _candidates() if ord(letter) in _characters(path)), None)


def _needed(texts: Iterable[str]) -> list[Path]:
    letters = sorted({letter for text in texts for letter in _pictures(text)})
    return [path for letter in letters if (path := font_of(letter)) is not None and path != _own()]


def _pictures(text: str) -> Iterator[str]:
    """The characters as they are drawn, without those that have no picture."""
    return (letter for letter in printable(text) if not letter.isascii() and not _has_no_picture(letter))


def _has_no_picture(letter: str) -> bool:
    return unicodedata.category(letter) in _WITHOUT_PICTURE or "\ufe00" <= letter <= "\ufe0f"


def _runs(text: str) -> list[tuple[Path, str]]:
    """Stretches of one font; what has no font stands in ours, as a box."""
    fonts: list[Path] = []
    for letter in text:
        own = letter.isascii() or (_has_no_picture(letter) and not fonts)
        fonts.append(_own() if own else fonts[-1] if _has_no_picture(letter) else font_of(letter) or _own())
    return [(path, "".join(letter for _, letter in part)) for path, part in groupby(zip(fonts, text), key=lambda pair: pair[0])]


def _script(letter: str) -> str:
    if unicodedata.category(letter) in ("So", "Sk"):
        return "emoji and other symbols"
    word = unicodedata.name(letter, "UNKNOWN CHARACTERS").split()[0]
    return {"CJK": "Chinese (Han)", "IDEOGRAPHIC": "Chinese (Han)"}.get(word, word.capitalize())


# ---- the fonts of this machine


@lru_cache(1)
def _own() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def _candidates() -> Iterator[Path]:
    yield _own()
    yield from _installed()


@lru_cache(1)
def _installed() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    def rank(path: Path) -> tuple[int, str]:
        name = path.stem.lower().replace("sansserif", "")
        return sum(word in name for word in _LESS_PLAIN), str(path)

    return sorted(map(Path, findSystemFonts()), key=rank)


@cache
def _characters(path: Path) -> frozenset[int]:
    """What a font has pictures of. Nothing for one that cannot be read, or has pixels in place of outlines (coloured emoji)."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(path))
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError, UnicodeError):
        return frozenset()


@cache
def _family(path: Path) -> str | None:
    """Its name, after which matplotlib knows the font."""
    from matplotlib.font_manager import FontProperties, fontManager

    try:
        fontManager.addfont(str(path))
        return FontProperties(fname=str(path)).get_name()
    except (OSError, RuntimeError, ValueError, UnicodeError):
        return None
