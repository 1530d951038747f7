"""What may have been meant by paths that do not exist: the fix that is named works."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.data.sources.near_paths import near_paths
from dtl.data.sources.open import open_source
from dtl.errors import UserError
from dtl.inference.images import find_images

ROWS = [(f"img/{label}/000{number}.jpg", label) for number in range(2) for label in ("ants", "bees")]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    image_folder(tmp_path / "img", {"ants": 2, "bees": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (lambda path: path.replace("/", "\\"), "; write / in place of backslashes ('img/ants/0000.jpg' exists)"),
        (lambda path: path.removesuffix(".jpg"), "; add the extension .jpg to each path ('img/ants/0000.jpg' exists)"),
        (lambda path: path.replace("/", "\\").removesuffix(".jpg"), "; write / in place of backslashes, and add the extension .jpg to each path ("),
        (lambda path: path.replace(".jpg", ".png"), "; the extension is .jpg ('img/ants/0000.jpg' exists)"),
        (lambda path: f"/{path}", "; leave out the leading / ('img/ants/0000.jpg' exists)"),
        (lambda path: f"~/{path}", "; write out the home folder in place of ~ ('{root}/img/ants/0000.jpg' exists)"),
        (lambda path: f"file://{{root}}/{path}", "; write the path without file:// and percent signs ('{root}/img/ants/0000.jpg' exists)"),
        (lambda path: path.replace("ants", "Ants").replace("bees", "BEES"), "; upper and lower case count: write paths as the files are named ("),
        (lambda path: path.removeprefix("img/"), "; put img/ before each path ('img/ants/0000.jpg' exists)"),
        (lambda path: path.removeprefix("img/").removesuffix(".jpg"), "; put img/ before each path, and add the extension .jpg to each path ("),
        (lambda path: path.split("/")[-1], "; put img/, the label and / before each path ('img/ants/0000.jpg' exists)"),
        (lambda path: f"data/photos/{path}", "; paths begin in the folder of the list; leave out data/photos of each ('img/ants/0000.jpg' exists)"),
        (lambda path: f"'{path}'", "; leave out the quotes (in CSV, quotes are double) ('img/ants/0000.jpg' exists)"),
        (lambda path: path.replace("img", "%69mg"), "; write the characters themselves in place of % and digits ("),
        (lambda path: path.replace("img", "image files"), ""),
    ],
)  # fmt: skip
def test_the_fix_of_a_list(root: Path, wrong: Callable[[str], str], fix: str) -> None:
    listed = root / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{wrong(path)},{label}\n" for path, label in ROWS).replace("{root}", str(root)))
    with pytest.raises(UserError) as refused:
        open_source(listed)
    expected = f"paths are relative to {root}{fix}".replace("{root}", str(root))
    assert str(refused.value).startswith(f"{listed}: 4 of 4 images do not exist: line 2: ")
    assert expected in str(refused.value)
    if not fix:
        assert str(refused.value).endswith(expected)
    with pytest.raises(UserError) as refused:
        find_images([str(listed)])
    assert f"{listed}: none of its 4 images exists, as '" in str(refused.value)
    assert ("exists)" in str(refused.value)) == bool(fix and "label" not in fix)


@pytest.mark.parametrize(
    ("text", "fix", "fixed"),
    [
        ("img/ants/0000.jpg black ant\nimg/bees/0000.jpg white bee\n", "labels of several words need tabs", lambda text: text.replace("jpg ", "jpg\t")),
        ("img/ants/0000.jpg, ant\nimg/bees/0000.jpg, bee\n", "begins with a header (path,label)", lambda text: f"path,label\n{text}"),
        ("img/ants/0000.jpg; ant\nimg/bees/0000.jpg; bee\n", "begins with a header (path;label)", lambda text: f"path;label\n{text}"),
    ],
)
def test_what_separates_the_columns(root: Path, text: str, fix: str, fixed: Callable[[str], str]) -> None:
    (root / "list.txt").write_text(text)
    with pytest.raises(UserError, match="2 of 2 images do not exist") as refused:
        open_source(root / "list.txt")
    assert fix in str(refused.value)
    (root / "list.txt").write_text(fixed(text))
    assert len(open_source(root / "list.txt").classes) == 2


@pytest.mark.parametrize(("header", "name"), [("img_name\tbreed", "list.tsv"), ("image breed", "list.txt")])
def test_a_first_line_that_is_a_header_of_other_names(root: Path, header: str, name: str) -> None:
    rows = [f"{path}\t{label}" for path, label in ROWS]
    (root / name).write_text("\n".join([header, *rows]))
    with pytest.raises(UserError, match=rf"1 of 5 images do not exist: line 1: .* to {root}; name the columns path and label if it is a header"):
        open_source(root / name)
    (root / name).write_text("\n".join(["path\tlabel", *rows]))
    assert open_source(root / name).num_samples == 4
    (root / name).write_text("\n".join(rows))
    assert open_source(root / name).num_samples == 4


def test_a_list_that_lies_elsewhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "elsewhere" / "list.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in ROWS))
    with pytest.raises(UserError, match=rf"paths begin in the folder of the list; move the list to {root} \("):
        open_source(root / "elsewhere" / "list.csv")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=rf"paths begin in the folder of the list; move the list to {root} \("):
        open_source("elsewhere/list.csv")
    (root / "elsewhere" / "list.csv").rename(root / "list.csv")
    assert open_source("list.csv").num_samples == 4


def test_letters_that_are_encoded_in_another_way(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFC", "é.jpg")).write_bytes(b"")
    assert "convert the list to Unicode NFC" in near_paths([(unicodedata.normalize("NFD", "é.jpg"), "x")], tmp_path)


def test_a_fix_that_holds_for_some_is_counted_and_many_are_not_all_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert near_paths([("a", "x"), ("b", "x")], tmp_path) == "; add the extension .jpg to each path for 1 of the 2 ('a.jpg' exists)"
    assert " for 1 of the first 20 (" in near_paths([("a", "x"), *[("b", "x")] * 500], tmp_path)
