"""Grids of tiles: how many, where, and what the words and marks do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dtl.report.examples import Tile
from dtl.report.grids import RIGHT, WRONG, fitting, save_grid, tile_image

_STEP = 156  # a tile of 144 pixels and a gap of 12


def tile(grey: int = 200, side: int = 32, **facts: object) -> Tile:
    return Tile(np.full((side, side, 3), grey, np.uint8), "a caption", **facts)  # type: ignore[arg-type]


def grid(folder: Path, tiles: list[Tile], columns: int = 8) -> Image.Image:
    save_grid(tiles, folder / "grid.png", columns=columns)
    with Image.open(folder / "grid.png") as image:
        image.load()
        return image


def hexed(image: Image.Image, x: int, y: int) -> str:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return "#" + "".join(f"{value:02x}" for value in pixel)


def test_tiles_are_set_row_by_row(tmp_path: Path) -> None:
    image = grid(tmp_path, [tile(grey) for grey in (10, 60, 110, 160, 210)], columns=2)
    assert image.width == 2 * _STEP + 12
    height = (image.height - 12) // 3
    centres = [(12 + 72 + column * _STEP, 12 + 72 + row * height) for row in range(3) for column in range(2)]
    assert [image.getpixel(centre) for centre in centres] == [(grey,) * 3 for grey in (10, 60, 110, 160, 210, 255)]


def test_few_tiles_take_few_columns_and_none_is_no_error(tmp_path: Path) -> None:
    assert grid(tmp_path, [tile()] * 3).width == 3 * _STEP + 12
    assert grid(tmp_path, [tile()] * 9).width == 8 * _STEP + 12
    assert grid(tmp_path, []).size == (_STEP + 12, 12)


def test_right_and_wrong_have_frames_and_others_none(tmp_path: Path) -> None:
    image = grid(tmp_path, [tile(right=True), tile(right=False), tile()])
    assert [hexed(image, 12 + number * _STEP, 12) for number in range(3)] == [RIGHT, WRONG, "#c8c8c8"]


def test_a_note_takes_a_line_of_its_own(tmp_path: Path) -> None:
    assert grid(tmp_path, [tile(), tile(note="of another")]).height > grid(tmp_path, [tile()]).height
    with_file = tile(note="of another", file="photos/ants/7.jpg")
    assert grid(tmp_path, [tile(), with_file]).height > grid(tmp_path, [tile(), tile(note="of another")]).height
    assert with_file.words == "a caption, of another, photos/ants/7.jpg"


def test_long_words_are_cut_to_the_tile() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (400, 20)))
    assert fitting(draw, "ant", 144) == "ant"
    assert fitting(draw, "", 0) == ""
    cut = fitting(draw, "an extraordinarily long name of a class", 144)
    assert cut.endswith("…")
    assert 8 < len(cut) < 39
    assert fitting(draw, "wide", 0) == "…"


@pytest.mark.parametrize(("own", "wanted"), [(16, 144), (28, 140), (64, 128), (100, 100), (300, 144)])
def test_small_pictures_are_enlarged_whole_times_and_large_ones_reduced(own: int, wanted: int) -> None:
    assert tile_image(tile(side=own), 144).size == (wanted, wanted)


def test_an_enlarged_picture_has_no_colour_that_was_not_there() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    large = np.asarray(tile_image(Tile(pixels, ""), 144))
    assert np.array_equal(large[::9, ::9], pixels)
    assert np.array_equal(large, pixels.repeat(9, 0).repeat(9, 1))
