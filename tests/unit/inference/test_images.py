"""Images as people name them: order, lists of every kind, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_images import encoded

from dtl.data.decoding.decode import decode
from dtl.data.sources.open import open_source
from dtl.errors import UserError
from dtl.inference.images import find_images
from dtl.reading import Reading
from dtl.text import csv_line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.jpg", "sub/my photo.jpg", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(seed=len(name)))
    (tmp_path / "sub/back").symlink_to(tmp_path)
    return tmp_path


def names(places: list[str], root: Path) -> list[str]:
    found = find_images(places)
    return [str(Path(found.name(number)).relative_to(root)) for number in range(len(found))]


def test_a_folder_is_sorted_and_links_back_and_hidden_files_are_passed_by(photos: Path) -> None:
    assert names([str(photos)], photos) == ["a.jpg", "b.jpg", "sub/my photo.jpg"]


def test_places_keep_their_order_and_numbers_run_through(photos: Path) -> None:
    places = [str(photos / "b.jpg"), str(photos / "sub"), str(photos / "a.jpg"), str(photos / "b.jpg")]
    assert names([places[0], str(photos / "a.jpg")], photos) == ["b.jpg", "a.jpg"]
    found = find_images([places[0], places[2]])
    np.testing.assert_array_equal(found.pixels(1, Reading()), decode((photos / "a.jpg").read_bytes()))
    with pytest.raises(IndexError):
        found.name(2)


@pytest.mark.parametrize(
    "text",
    [
        "sub/my photo.jpg\nb.jpg\n",
        "sub/my photo.jpg 3\nb.jpg 0\n",
        "sub/my photo.jpg\t3\nb.jpg\t0\n",
        '"sub/my photo.jpg"\n\n"b.jpg"\n',
        "label,path\n3,sub/my photo.jpg\n0,b.jpg\n",
    ],
)
def test_lists_of_every_kind_name_the_same(photos: Path, text: str) -> None:
    (photos / "list.txt").write_text("\ufeff" + text, encoding="utf-8")
    assert names([str(photos / "list.txt")], photos) == ["sub/my photo.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jpg", None, "does not exist"),
        ("x.tar", b"", "is a tar; give the folder"),
        ("list.txt", b"\n\n", "lists no images"),
        ("list.txt", b"hello world\n", "no line is the path of an image"),
        ("data.bin", b"\xff\xfe\x00", "is neither an image nor a list of images"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_images([str(tmp_path / name)])


def test_a_list_in_csv_is_read_as_dtl_writes_it(tmp_path: Path) -> None:
    """Cells that a spreadsheet would compute have an apostrophe; a CSV that is none is one line."""
    for name in ("=1+1.jpg", "plain.jpg"):
        (tmp_path / name).write_bytes(encoded(seed=1))
    listed = tmp_path / "list.csv"
    listed.write_text(csv_line(["path", "label"]) + csv_line(["=1+1.jpg", "-a"]) + csv_line(["plain.jpg", "b"]))
    assert "'=1+1.jpg" in listed.read_text()
    assert names([str(listed)], tmp_path) == ["=1+1.jpg", "plain.jpg"]
    assert open_source(listed).classes == ("-a", "b")
    listed.write_text('path,label\n"' + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r'list\.csv, line 2: a quote opens here that is not closed: `"xxx'):
        find_images([str(listed)])
