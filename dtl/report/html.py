"""One self-contained page: text, tables and embedded images; no script, no font, no address of anything else.

The blocks of a page are plain values; `page.html.j2` turns them into HTML, and escapes all texts. The page's own security policy forbids
the browser to load anything, so it cannot ask the network even by mistake.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jinja2

from dtl.report.grids import MARKS, tile_image
from dtl.text import printable_lines

if TYPE_CHECKING:
    from dtl.report.examples import Tile

_TILE_SIDE, _LARGE_SIDE = 160, 256  # pixels: more than they are shown with, for sharp screens
_PIXELATED = 64


class Block:
    """A part of a page. The template has a macro for each `kind`."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Section(Block):
    kind = "section"
    heading: str
    blocks: tuple[Block, ...]


def section(heading: str, *blocks: Block | None) -> Section:
    """A heading and what there is of its blocks."""
    return Section(heading, tuple(block for block in blocks if block is not None))


@dataclass(frozen=True)
class Subheading(Block):
    kind = "subheading"
    words: str


@dataclass(frozen=True)
class Text(Block):
    kind = "text"
    words: str
    soft: bool = False


@dataclass(frozen=True)
class Bullets(Block):
    kind = "bullets"
    lines: Sequence[str]


@dataclass(frozen=True)
class Headline(Block):
    """The few numbers that matter: (value, what it is)."""

    kind = "headline"
    numbers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts(Block):
    """(name, value)"""

    kind = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """A table's cell; a number is set to the right."""

    text: str
    number: bool = False


@dataclass(frozen=True)
class Table(Block):
    """In a narrow window each row becomes a small card, so that nothing has to be scrolled sideways; a `compact` table fits as it is."""

    kind = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    compact: bool = False

    @property
    def number_columns(self) -> list[bool]:
        return [all(row[i].number or row[i].text == "–" for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Picture:
    """An image with its size, so that the page does not jump while it loads."""

    source: str
    """An address that holds the image itself."""
    width: int
    height: int


@dataclass(frozen=True)
class Plot(Block):
    """A drawing with dark ink on white, `width` pixels of the page; dark windows show it with light ink on black."""

    kind = "plot"
    picture: Picture
    alt: str
    width: int
    caption: str = ""
    narrow: Picture | None = None
    """The drawing for narrow windows."""


def plot(file: Path, alt: str, *, width: int, caption: str = "", narrow: Path | None = None) -> Plot:
    """The PNG `file`, and the PNG `narrow` for narrow windows."""
    return Plot(_embedded(file), alt, width, caption, None if narrow is None else _embedded(narrow))


@dataclass(frozen=True)
class Beside(Block):
    """Next to each other where there is room."""

    kind = "beside"
    columns: Sequence[Sequence[Block]]


@dataclass(frozen=True)
class Tiles(Block):
    """A grid of images that fits the window; with `fours` each row holds whole fours, and `large` ones show what an image is of."""

    kind = "tiles"
    tiles: Sequence[Tile]
    fours: bool = False
    large: bool = False

    @property
    def pictures(self) -> list[tuple[Tile, str, Picture, bool]]:
        return _pictures(self.tiles, _LARGE_SIDE if self.large else _TILE_SIDE)


@dataclass(frozen=True)
class Pairs(Block):
    """Two images next to each other, larger than tiles, with words about both."""

    kind = "pairs"
    pairs: Sequence[tuple[str, Tile, Tile]]

    @property
    def pictures(self) -> list[tuple[str, list[tuple[Tile, str, Picture, bool]]]]:
        return [(words, _pictures((one, other), _LARGE_SIDE)) for words, one, other in self.pairs]


@dataclass(frozen=True)
class Details(Block):
    """A text that opens by a click."""

    kind = "details"
    summary: str
    body: str


def page(title: str, lead: Sequence[Block], sections: Sequence[Block], *, footer: str) -> str:
    """The whole document."""
    return _template().render(title=title, lead=lead, sections=sections, footer=footer)


def _shown(value: object) -> object:
    """What the template puts into the page: names of others without control characters; what is HTML already, as it is."""
    return printable_lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@lru_cache(1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    return environment.get_template("page.html.j2")


def _embedded(file: Path) -> Picture:
    from PIL import Image

    with Image.open(file) as image:
        return Picture(f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", image.width, image.height)


def _pictures(tiles: Sequence[Tile], side: int) -> list[tuple[Tile, str, Picture, bool]]:
    """(tile, its mark, its picture, whether the browser enlarges it pixel by pixel)"""
    return [(tile, MARKS[tile.right], _tile_picture(tile, side), tile.pixels.shape[1] <= _PIXELATED) for tile in tiles]


def _tile_picture(tile: Tile, side: int) -> Picture:
    """Small images as they are, enlarged by the browser; photos as JPEG, a tenth of the bytes."""
    from PIL import Image

    image, data = tile_image(tile, side), io.BytesIO()
    if tile.pixels.shape[1] <= _PIXELATED:
        Image.fromarray(tile.pixels).save(data, "PNG")
        kind = "png"
    else:
        image.save(data, "JPEG", quality=88)
        kind = "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", image.width, image.height)
