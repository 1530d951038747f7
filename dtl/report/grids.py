"""Grids of images with their words, as one PNG each: right in green with a tick, wrong in red with a cross."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.errors import printable
from dtl.report.fonts import GridFont

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from dtl.report.examples import Tile

RIGHT, WRONG = "#00734f", "#c22b20"
MARKS = {True: "✓", False: "✗", None: ""}
_COLUMNS, _SIDE, _GAP, _FRAME, _LINE = 8, 144, 12, 4, 19
_SMALL = 64  # images up to this side are enlarged pixel by pixel, to show what there really is


def save_grid(tiles: Sequence[Tile], path: Path, *, columns: int = _COLUMNS) -> None:
    """Write the tiles, row by row, as one PNG."""
    from PIL import Image, ImageDraw

    columns = min(columns, max(1, len(tiles)))
    lines = max(1, *(1 + bool(tile.note) + bool(tile.file) for tile in tiles)) if tiles else 1
    height = _SIDE + lines * _LINE + _GAP + 4
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, tile in enumerate(tiles):
        left, top = _GAP + place % columns * (_SIDE + _GAP), _GAP + place // columns * height
        _draw_tile(sheet, draw, tile, left, top)
    sheet.save(path)


def tile_image(tile: Tile, side: int) -> Image:
    """The picture of a tile, `side` pixels wide at least (small images whole times their size) and not much more."""
    from PIL import Image

    image = Image.fromarray(tile.pixels)
    own = image.width
    if own <= _SMALL:
        times = max(1, round(side / own))
        return image.resize((own * times, own * times), Image.Resampling.NEAREST)
    return image if own <= side else image.resize((side, side), Image.Resampling.LANCZOS)


def _draw_tile(sheet: Image, draw: ImageDraw, tile: Tile, left: int, top: int) -> None:
    from PIL import Image

    color = {True: RIGHT, False: WRONG, None: "#1a1a1a"}[tile.right]
    side = _SIDE
    if tile.right is not None:
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=color)
        side -= 2 * _FRAME
    offset = (_SIDE - side) // 2
    picture = Image.fromarray(tile.pixels)
    method = Image.Resampling.NEAREST if picture.width <= _SMALL else Image.Resampling.LANCZOS
    sheet.paste(picture.resize((side, side), method), (left + offset, top + offset))
    mark = MARKS[tile.right] + " " if tile.right is not None else ""
    draw.text((left, top + _SIDE + 3), fitting(draw, mark + tile.caption, _SIDE), fill=color, font=_font())
    below = [words for words in (tile.note, tile.file.rpartition("/")[2]) if words]
    for line, words in enumerate(below, start=1):
        draw.text((left, top + _SIDE + 3 + line * _LINE), fitting(draw, words, _SIDE), fill="#5f5f5f", font=_font())


def fitting(draw: ImageDraw, text: str, width: int) -> str:
    """The text in one line, cut with an ellipsis where it would be wider than `width` pixels."""
    text = printable(text)
    if draw.textlength(text, font=_font()) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if draw.textlength(text[:middle] + "…", font=_font()) <= width else (low, middle - 1)
    return text[:low].rstrip() + "…"


@lru_cache(1)
def _font() -> Any:
    """The font of the plots, and for what it lacks those of this machine."""
    return GridFont()
