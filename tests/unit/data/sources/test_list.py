"""List files, as text and as CSV."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_images import encoded, image_folder

from dtl.data.sources.base import Source
from dtl.data.sources.open import open_source
from dtl.errors import UserError
from dtl.text import csv_line


def names(source: Source) -> list[str]:
    return [source.names[sample] for sample in range(source.num_samples)]


def loose(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def _listed(root: Path, text: str, name: str = "list.txt") -> Path:
    image_folder(root, {"ants": 2, "bees": 2})
    (root / "ants" / "ant photos.jpg").write_bytes(encoded(seed=77))
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_a_line_per_image(tmp_path: Path) -> None:
    source = open_source(_listed(tmp_path, "ants/0000.jpg ant\n\nants/ant photos.jpg\tant\n  bees/0001.jpg   bee \n"))
    assert source.classes == ("ant", "bee")
    assert names(source) == ["ants/0000.jpg", "ants/ant photos.jpg", "bees/0001.jpg"]
    assert source.labels.tolist() == [0, 0, 1]


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    source = open_source(_listed(tmp_path, "ants/0000.jpg 10\nants/0001.jpg 9\nbees/0000.jpg 0\nbees/0001.jpg 10\n"))
    assert source.classes == ("0", "9", "10")
    assert source.labels.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nants/0000.jpg,ant\n'ants/ant photos.jpg',ant\nbees/0001.jpg,bee\n".replace("'", '"'),
        "\ufeffid,Filename,Class\n1,ants/0000.jpg,ant\n2,ants/ant photos.jpg,ant\n3,bees/0001.jpg,bee\n",
        "class;image\nant;ants/0000.jpg\nant;ants/ant photos.jpg\nbee;bees/0001.jpg\n",
        "target\tfile\nant\tants/0000.jpg\nant\tants/ant photos.jpg\n\nbee\tbees/0001.jpg\n",
    ],
)
def test_csv_with_a_header(tmp_path: Path, text: str) -> None:
    source = open_source(_listed(tmp_path, text, "list.csv"))
    assert names(source) == ["ants/0000.jpg", "ants/ant photos.jpg", "bees/0001.jpg"]
    assert source.classes == ("ant", "bee")


def test_a_line_too_long_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        open_source(_listed(tmp_path, "ants/0000.jpg " * 400 + "\n"), labelled=False)
    for text in ("x" * 400 + "\n", "path,label\n" + "x" * 400 + ".jpg,ant\nants/0000.jpg,bee\n"):
        with pytest.raises(UserError, match=r"begins with a header|do not exist"):
            open_source(_listed(tmp_path, text, "list.csv"))


def test_a_prediction_csv_as_a_list(tmp_path: Path) -> None:
    """Names that a spreadsheet would compute stand there with an apostrophe, which is not part of them."""
    source_list = _listed(tmp_path, "", "predictions.csv")
    for name in ("=1+1.jpg", "'-2.jpg", "ant.jpg"):
        (source_list.parent / name).write_bytes(encoded())
    lines = [csv_line(cells) for cells in (["path", "label"], ["=1+1.jpg", "+a"], ["'-2.jpg", "@b"], ["ant.jpg", "'c"])]
    source_list.write_text("".join(lines), encoding="utf-8")
    source = open_source(source_list)
    assert sorted(names(source)) == ["'-2.jpg", "=1+1.jpg", "ant.jpg"]
    assert set(source.classes) == {"+a", "@b", "'c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("\n\n", "lists no images"),
        ("ants/0000.jpg ant\nants/0001.jpg\n", r"list.txt, line 2: no label: `ants/0001.jpg`; a line is `path label`"),
        ("ants/0000.jpg ant\nants/9.jpg bee\n", r"1 of 2 images do not exist: line 2: ants/9.jpg; paths are relative to"),
        ("ants/0000.jpg ant\nants/0001.jpg ant\n", "has only one class, 'ant'; a classifier needs two or more$"),
        ("ants/0000.jpg ant\n", "has only one class, 'ant'; a classifier needs two or more, and more than its one image$"),
        ("path,label\nants/0000.jpg,ant\nants/0001.jpg,\n", r"line 3: no label: `ants/0001.jpg,`"),
        ("path,label\nants/0000.jpg,ant\n,bee\n", r"line 3: no path: `,bee`"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(_listed(tmp_path, text))


def test_many_missing_files_are_counted(tmp_path: Path) -> None:
    text = "".join(f"nowhere/{number}.jpg {number % 2}\n" for number in range(9))
    with pytest.raises(UserError, match=r"9 of 9 images do not exist: line 1: .*line 3: nowhere/2.jpg; and 6 more"):
        open_source(_listed(tmp_path, text))


def test_csv_without_header_and_a_file_that_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: a CSV list begins with a header that names a path and a label column"):
        open_source(_listed(tmp_path, "ants/0000.jpg,ant\n", "list.csv"))
    with pytest.raises(UserError, match="is not a list: it is not UTF-8 text"):
        open_source(tmp_path / "ants" / "0000.jpg")


def test_a_list_with_given_classes(tmp_path: Path) -> None:
    path = _listed(tmp_path, "ants/0000.jpg ant\nbees/0000.jpg bee\n")
    assert open_source(path, classes=["ant", "asp", "bee"]).labels.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"line 2: class 'bee' is not in the given class list; did you mean 'bees'\?"):
        open_source(path, classes=["ant", "bees"])
    with pytest.raises(UserError, match=r"line 1: class 'ant' is not in the given class list; it has '0', '1'$"):
        open_source(path, classes=["0", "1"])


@pytest.mark.parametrize("text", ["a b.jpg\nc.jpg\n", "path\na b.jpg\nc.jpg\n", "path,label\na b.jpg,x\nc.jpg,x\n", "a b.jpg x\nc.jpg x\n"])
def test_lists_without_labels(tmp_path: Path, text: str) -> None:
    loose(tmp_path, "a b.jpg", "c.jpg")
    (tmp_path / "list.csv" if text.startswith("path") else tmp_path / "list.txt").write_text(text)
    source = open_source(next(tmp_path.glob("list.*")), labelled=False)
    assert (list(source.names), source.labels.tolist()) == (["a b.jpg", "c.jpg"], [0, 0])
    assert source.classes == (("x",) if " x" in text or ",x" in text else ("unlabelled",))


def test_labels_are_the_names_of_the_classes(tmp_path: Path) -> None:
    """001 and 002 stay what they are, so that folders of these names go with the list, either way round."""
    image_folder(tmp_path / "img", {"001": 2, "002": 2})
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"img/{label}/0000.jpg,{label}\n" for label in ("001", "002")))
    folders, listed = open_source(tmp_path / "img"), open_source(tmp_path / "list.csv")
    assert folders.classes == listed.classes == ("001", "002")
    assert open_source(tmp_path / "list.csv", classes=folders.classes).labels.tolist() == [0, 1]
    assert open_source(tmp_path / "img", classes=listed.classes).labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "list.csv").write_text("path,label\nimg/001/0000.jpg,1\nimg/002/0000.jpg,2\n")
    with pytest.raises(UserError, match=r"class '1' is not in the given class list; did you mean '001'\? \(spreadsheets take leading zeros away\)"):
        open_source(tmp_path / "list.csv", classes=folders.classes)


def test_numbers_and_texts_do_not_become_one_class(tmp_path: Path) -> None:
    assert open_source(_listed(tmp_path, "ants/0000.jpg 010\nants/0001.jpg 9\nbees/0000.jpg 10\nbees/0001.jpg -1\n")).classes == ("-1", "9", "010", "10")


def test_splits_of_a_list(tmp_path: Path) -> None:
    source = open_source(_listed(tmp_path, "path,label,split\nants/0000.jpg,ant,test\nbees/0000.jpg,bee,train\nants/0001.jpg,ant,train\n", "list.csv"))
    assert (source.split_names, source.splits.tolist()) == (("train", "test"), [1, 0, 0])
    assert source.has_splits
    other = open_source(_listed(tmp_path, "path,label,split\nants/0000.jpg,ant,train\nbees/0000.jpg,bee,train\nants/0001.jpg,ant,train\n", "list.csv"))
    assert (other.split_names, other.has_splits) == (("train",), False)
    assert source.fingerprint != other.fingerprint


def test_rows_and_labels_that_are_hardly_meant_are_noted(tmp_path: Path) -> None:
    text = "path,label\nants/0000.jpg,ant\nants/0001.jpg,Ant\nbees/0000.jpg,07\nbees/0001.jpg,7\nants/ant photos.jpg,NaN\n"
    text += "./ants/0000.jpg,ant\nbees//0000.jpg,ant\n"
    assert open_source(_listed(tmp_path, text, "list.csv")).notes == (
        "1 label in two spellings, which are two classes, by upper and lower case: 'ant', 'Ant'",
        "1 label in two spellings, which are two classes, by leading zeros: '07', '7'",
        "1 row with the label 'NaN', which is a class here; remove them if it means that there is no label",
        "2 rows with an image that an earlier row has; each row counts (line 7 names the image of line 2)",
        "1 row with another label than an earlier row of the same image: bees//0000.jpg is '07' in line 4 and 'ant' in line 8",
    )


def test_an_image_in_two_splits_is_noted(tmp_path: Path) -> None:
    source = open_source(_listed(tmp_path, "path,label,is_valid\nants/0000.jpg,ant,0\nbees/0000.jpg,bee,0\nants/0000.jpg,ant,1\n", "list.csv"))
    assert source.notes == (
        "column 'is_valid': 2 train, 1 val",
        "1 row with an image that an earlier row has; each row counts (line 4 names the image of line 2)",
        "1 row with another split than an earlier row of the same image: ants/0000.jpg is 'train' in line 2 and 'val' in line 4",
    )
