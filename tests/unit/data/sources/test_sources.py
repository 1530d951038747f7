"""What is recognised as a source, what is left out of it and said, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_images import encoded, image_folder, pixels

from dtl.data.sources.base import Source
from dtl.data.sources.content_split import split_by_content
from dtl.data.sources.digits import read_digits
from dtl.data.sources.open import open_source
from dtl.data.sources.png import store_png
from dtl.errors import UserError


def names(source: Source) -> list[str]:
    return [source.names[sample] for sample in range(source.num_samples)]


def notes(source: Source) -> str:
    return "\n".join(source.notes)


# --- image folders


def test_a_folder_per_class(tmp_path: Path) -> None:
    source = open_source(image_folder(tmp_path, {"bees": 2, "ants": 3}))
    assert source.classes == ("ants", "bees")
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert names(source) == ["ants/0000.jpg", "ants/0001.jpg", "ants/0002.jpg", "bees/0000.jpg", "bees/0001.jpg"]
    assert source.split_names == ("all",)
    assert source.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.jpg"))
    assert source.notes == ()


def test_class_order_is_that_of_torchvision(tmp_path: Path) -> None:
    from torchvision import datasets

    image_folder(tmp_path, dict.fromkeys(["101", "11", "2", "Zebra", "ant", "äpfel", "b c", "~x", "日本"], 2))
    assert list(open_source(tmp_path).classes) == datasets.ImageFolder(tmp_path).classes


def test_files_of_all_kinds_by_extension(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    for name in [
        "1.JPG",
        "2.jpeg",
        "3.PNG",
        "4.webp",
        "5.Bmp",
        "6.gif",
        "7.TIF",
        "8.tiff",
        "F.pergan.28(f).jpg",
        "ant photos.jpg",
        "ü.jpg",
    ]:
        (tmp_path / "a" / name).write_bytes(encoded())
    source = open_source(tmp_path)
    assert source.counts().tolist() == [[12, 1]]
    assert "a/ant photos.jpg" in names(source)
    assert "a/ü.jpg" in names(source)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "x.jpg").write_bytes(encoded())
    for name in [".DS_Store", "a/._0000.jpg", "a/Thumbs.db", "a/notes.txt", "a/clip.mp4", "loose.jpg", "README.md"]:
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.num_samples == 2
    assert source.classes == ("a", "b")
    assert "4 hidden or system files left out" in notes(source)
    assert "'.ipynb_checkpoints'" in notes(source)
    assert "2 files without an image's extension left out ('a/clip.mp4', 'a/notes.txt')" in notes(source)
    assert "1 image outside of any class folder left out ('loose.jpg')" in notes(source)


def test_nested_folders_and_a_folder_called_like_an_image(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "x.jpg").mkdir()
    (tmp_path / "a" / "x.jpg" / "deep").mkdir()
    (tmp_path / "a" / "x.jpg" / "deep" / "1.png").write_bytes(encoded("PNG"))
    source = open_source(tmp_path)
    assert names(source) == ["a/0000.jpg", "a/x.jpg/deep/1.png", "b/0000.jpg"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    image_folder(tmp_path / "real", {"a": 2, "b": 1})
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "real" / "a")
    (root / "b").mkdir()
    (root / "b" / "link.jpg").symlink_to(tmp_path / "real" / "b" / "0000.jpg")
    (root / "b" / "loop").symlink_to(root / "b")
    (root / "b" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert names(open_source(root)) == ["a/0000.jpg", "a/0001.jpg", "b/broken.jpg", "b/link.jpg"], "packing will name the broken one"


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    path = os.fsencode(tmp_path / "a") + b"/\xff\xfe.jpg"
    with open(path, "wb") as file:
        file.write(encoded())
    source = open_source(tmp_path)
    assert os.fsencode(names(source)[1]) == b"a/\xff\xfe.jpg"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Val"])
def test_train_and_val_below_one_root(tmp_path: Path, val: str) -> None:
    image_folder(tmp_path / "train", {"a": 3, "b": 2})
    image_folder(tmp_path / val, {"a": 1, "b": 1}, seed=1)
    source = open_source(tmp_path)
    assert source.split_names == ("train", "val")
    assert source.counts().tolist() == [[3, 2], [1, 1]]
    assert names(source)[-1] == f"{val}/b/0000.jpg"
    assert (f"'{val}' is used for validation" in notes(source)) == (val != "val")


def test_val_goes_before_test_and_is_told(tmp_path: Path) -> None:
    for seed, name in enumerate(["train", "test", "valid", "extra"]):
        image_folder(tmp_path / name, {"a": 2, "b": 2}, seed=seed)
    source = open_source(tmp_path)
    assert source.split_names == ("train", "val", "test")
    assert {name.split("/")[0] for name in names(source)} == {"train", "valid", "test"}
    assert "'valid' is used for validation, 'test' is kept apart" in notes(source)
    assert "left out beside train and valid: 'extra'" in notes(source)


def test_classes_that_are_called_train_and_test(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train": 2, "test": 2, "tram": 1})
    source = open_source(tmp_path)
    assert source.classes == ("test", "train", "tram")
    assert source.split_names == ("all",)


def test_val_may_lack_a_class_and_keeps_the_numbers_of_train(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    image_folder(tmp_path / "val", {"a": 1, "c": 1}, seed=1)
    (tmp_path / "val" / "b").mkdir()
    source = open_source(tmp_path)
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 2]
    assert "val has no image of 1 class: 'b'" in notes(source)


def test_given_classes_fix_the_numbers(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "c": 2})
    source = open_source(tmp_path, classes=["a", "b", "c"])
    assert source.classes == ("a", "b", "c")
    assert source.labels.tolist() == [0, 2, 2]
    with pytest.raises(UserError, match="1 class that the given class list does not know: 'c'; known are 'a', 'b'"):
        open_source(tmp_path, classes=["a", "b"])


def test_empty_class_folder_is_refused_or_left_out(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1, "c": 0})
    with pytest.raises(UserError, match="class folder 'c' holds no image; remove what is no class"):
        open_source(tmp_path)
    source = open_source(tmp_path, on_error="skip")
    assert source.classes == ("a", "b")
    assert "class folders without an image left out: 'c'" in notes(source)


def loose(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def test_images_without_labels(tmp_path: Path) -> None:
    """Straight in the folder, in folders of any depth, or in train/ and val/: one class. A folder for a classifier stays one."""
    flat = open_source(loose(tmp_path / "flat", "b.jpg", "a.jpg", "2024/may/c.png"), labelled=False)
    assert (flat.classes, list(flat.names), flat.labels.tolist()) == (("unlabelled",), ["2024/may/c.png", "a.jpg", "b.jpg"], [0, 0, 0])
    assert not flat.has_splits
    assert not flat.notes
    one = open_source(loose(tmp_path / "one", "things/a.jpg", "things/b.jpg"), labelled=False)
    assert (one.classes, one.num_samples) == (("unlabelled",), 2)
    split = open_source(loose(tmp_path / "split", "train/a.jpg", "train/b.jpg", "val/c.jpg"), labelled=False)
    assert (split.split_names, split.counts().tolist()) == (("train", "val"), [[2], [1]])
    labelled = loose(tmp_path / "labelled", "ants/a.jpg", "bees/b.jpg")
    assert open_source(labelled, labelled=False).fingerprint == open_source(labelled).fingerprint, "packed once for both"
    assert open_source(labelled, labelled=False, classes=("unlabelled",)).labels.tolist() == [0, 0], "for the validation of the others"
    for folder in ("flat", "one"):
        with pytest.raises(UserError, match="without labels, only the task rotate can learn"):
            open_source(tmp_path / folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_source(tmp_path / "empty", labelled=False)


@pytest.mark.parametrize("text", ["a b.jpg\nc.jpg\n", "path\na b.jpg\nc.jpg\n", "path,label\na b.jpg,x\nc.jpg,x\n", "a b.jpg x\nc.jpg x\n"])
def test_lists_without_labels(tmp_path: Path, text: str) -> None:
    loose(tmp_path, "a b.jpg", "c.jpg")
    (tmp_path / "list.csv" if text.startswith("path") else tmp_path / "list.txt").write_text(text)
    source = open_source(next(tmp_path.glob("list.*")), labelled=False)
    assert (list(source.names), source.labels.tolist()) == (["a b.jpg", "c.jpg"], [0, 0])
    assert source.classes == (("x",) if " x" in text or ",x" in text else ("unlabelled",))


def test_fingerprint_changes_with_the_files_only(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "one", {"a": 2, "b": 2})
    first = open_source(root).fingerprint
    assert open_source(root).fingerprint == first
    root = root.rename(tmp_path / "two")
    assert open_source(root).fingerprint == first, "paths are relative"
    seen = {first}
    for change in [
        lambda: os.utime(root / "a" / "0000.jpg", (1, 1)),
        lambda: (root / "a" / "0000.jpg").write_bytes(encoded(height=99)),
        lambda: (root / "a" / "0001.jpg").rename(root / "a" / "0002.jpg"),
        lambda: (root / "a" / "0002.jpg").rename(root / "b" / "0002.jpg"),
        lambda: (root / "b").rename(root / "z"),
        lambda: (root / "z" / "0000.jpg").unlink(),
    ]:
        change()
        fingerprint = open_source(root).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)


# --- what is refused


def _make(root: Path, case: str) -> Path:
    root.mkdir()
    if case == "one class":
        return image_folder(root, {"only": 3})
    if case == "train alone":
        image_folder(root / "train", {"a": 1, "b": 1})
    elif case == "loose images":
        (root / "1.jpg").write_bytes(encoded())
    elif case == "other files":
        image_folder(root, {"a": 0})
        (root / "a" / "x.txt").write_text("x")
    elif case == "unknown in val":
        image_folder(root / "train", {"a": 1, "b": 1})
        image_folder(root / "val", {"a": 1, "wasp": 1})
    elif case == "empty val":
        image_folder(root / "train", {"a": 1, "b": 1})
        image_folder(root / "val", {"a": 0})
    return root


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", r"photos holds no images$"),
        ("one class", r"photos has one class only, 'only'; a classifier needs two or more"),
        ("train alone", r"has one class only, 'train'; did you mean .*photos/train, which has 2 folders\?"),
        (
            "loose images",
            r"has 1 image directly in it and no images in class folders; put each class in a folder of its own \(photos/CLASS/1.jpg\)",
        ),
        ("other files", r"holds no images, only other files \('a/x.txt'\)"),
        ("unknown in val", r"photos/val has images of 1 class that training does not know: 'wasp'; known are 'a', 'b'"),
        ("empty val", r"photos/val holds no images"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, case: str, message: str) -> None:
    root = _make(tmp_path / "photos", case)
    with pytest.raises(UserError, match=message) as error:
        open_source(root)
    assert "\n" not in str(error.value)


def test_missing_sources(tmp_path: Path) -> None:
    image_folder(tmp_path / "hymenoptera/train", {"a": 1, "b": 1})
    (tmp_path / "link").symlink_to(tmp_path / "away")
    for name, message in [
        ("hymenoptra", f"hymenoptra does not exist; did you mean '{tmp_path}/hymenoptera'?"),
        ("hymenoptra/trian", f"trian does not exist .nor does the folder .*; did you mean '{tmp_path}/hymenoptera/train'?"),
        ("zzz", "zzz does not exist; give a folder of images"),
        ("no/such", r"does not exist \(nor does the folder"),
        ("link", "is a link to .*away, which does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)


# --- lists


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("\n\n", "lists no images"),
        ("ants/0000.jpg ant\nants/0001.jpg\n", r"list.txt, line 2: no label: `ants/0001.jpg`; a line is `path label`"),
        ("ants/0000.jpg ant\nants/9.jpg bee\n", r"1 of 2 images do not exist: line 2: ants/9.jpg; paths are relative to"),
        ("ants/0000.jpg ant\nants/0001.jpg ant\n", "has one class only, 'ant'"),
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


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "photos.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"photos.tar.gz is an archive; unpack it and give the folder"):
        open_source(tmp_path / "photos.tar.gz")


def test_csv_without_header_and_a_file_that_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: a CSV list begins with a header that names a path and a label column"):
        open_source(_listed(tmp_path, "ants/0000.jpg,ant\n", "list.csv"))
    with pytest.raises(UserError, match="is not a list: it is no UTF-8 text"):
        open_source(tmp_path / "ants" / "0000.jpg")


def test_a_list_with_given_classes(tmp_path: Path) -> None:
    path = _listed(tmp_path, "ants/0000.jpg ant\nbees/0000.jpg bee\n")
    assert open_source(path, classes=["ant", "asp", "bee"]).labels.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"line 2: class 'bee' is not in the given class list; did you mean 'bees'\?"):
        open_source(path, classes=["ant", "bees"])


# --- display names


@pytest.mark.parametrize("where", ["train", ".", ".."])
@pytest.mark.parametrize("name", ["cat_to_name.json", "class_names.json", "names.json"])
def test_display_names_beside_or_above(tmp_path: Path, where: str, name: str) -> None:
    root = tmp_path / "flowers"
    image_folder(root / "train", {"1": 1, "2": 1})
    image_folder(root / "val", {"1": 1, "2": 1})
    (root / where / name).write_text(json.dumps({"1": "pink primrose", "2": "orchid", "99": "unused"}))
    source = open_source(root)
    assert source.display_names == {"1": "pink primrose", "2": "orchid"}
    assert f"display names from {os.path.normpath(root / where / name)}" in notes(source)


def test_display_names_by_option(tmp_path: Path) -> None:
    image_folder(tmp_path / "p", {"1": 1, "2": 1})
    file = tmp_path / "shown.json"
    file.write_text('{"1": "one"}')
    assert open_source(tmp_path / "p", names=file).display_names == {"1": "one"}
    for text, message in [('{"x": "y"}', "names none of the classes"), ("[1]", "is not a JSON object"), ("{", "is no readable JSON")]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "p", names=file)
    with pytest.raises(UserError, match="does not exist; it should be a JSON file"):
        open_source(tmp_path / "p", names=tmp_path / "no.json")


def test_a_broken_file_of_names_is_told_not_obeyed(tmp_path: Path) -> None:
    image_folder(tmp_path / "p", {"1": 1, "2": 1})
    (tmp_path / "p" / "names.json").write_text("{")
    source = open_source(tmp_path / "p")
    assert source.display_names == {}
    assert "display names not used" in notes(source)


# --- CIFAR


def _cifar10(folder: Path) -> Path:
    """The layout of torchvision's cifar-10-batches-py, with a few images in each batch."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (4, 3072), np.uint8)
        batch = {"data": data, "labels": [0, 1, 2, number % 3], "filenames": [f"{number}_{i}.png" for i in range(4)], "batch_label": "x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile", "bird"]}, protocol=2))
    return folder


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10(tmp_path: Path, parent: bool) -> None:
    folder = _cifar10(tmp_path / "cifar-10-batches-py")
    source = open_source(tmp_path if parent else folder)
    assert source.kind == "CIFAR-10"
    assert source.classes == ("airplane", "automobile", "bird")
    assert source.split_names == ("train", "val")
    assert source.counts().sum(1).tolist() == [20, 4]
    assert names(source)[5] == "data_batch_2/1_1.png"
    raw = pickle.loads((folder / "data_batch_2").read_bytes())["data"][1]
    assert source.images is not None
    np.testing.assert_array_equal(source.images[5], raw.reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in [("train", 6), ("test", 2)]:
        data = np.zeros((count, 3072), np.uint8)
        fine = [number % 2 for number in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": fine, "coarse_labels": [0] * count}, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "baby"], "coarse_label_names": ["x"]}, protocol=2))
    source = open_source(tmp_path)
    assert (source.kind, source.classes) == ("CIFAR-100", ("apple", "baby"))
    assert source.counts().tolist() == [[3, 3], [1, 1]]
    _cifar10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(UserError, match="holds CIFAR-10 and CIFAR-100; name one of them"):
        open_source(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/should-not-exist",)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pickle.dumps(_Evil()), "it asks for (posix|nt).system, which no array needs"),
        (b"garbage", "is no CIFAR batch"),
        (pickle.dumps([1]), "it holds a list"),
        (pickle.dumps({"data": 1}), "it has data, not data and labels"),
        (pickle.dumps({"data": np.zeros((2, 10), np.uint8), "labels": [0, 1]}), r"data is uint8 \(2, 10\)"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}), "labels go from 3 to 3, but there are 3 classes"),
    ],
)
def test_cifar_batches_that_are_refused(tmp_path: Path, batch: bytes, message: str) -> None:
    folder = _cifar10(tmp_path / "c")
    (folder / "data_batch_3").write_bytes(batch)
    with pytest.raises(UserError, match=f"data_batch_3.*{message}"):
        open_source(folder)


def test_a_missing_cifar_batch(tmp_path: Path) -> None:
    folder = _cifar10(tmp_path / "c")
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4 is missing; unpack CIFAR's archive again"):
        open_source(folder)


# --- digits and the split by content


def test_digits_are_those_of_scikit_learn() -> None:
    """The hashes were made from sklearn.datasets.load_digits() of scikit-learn 1.9.1, its 0 ... 16 as 0 ... 255, rounded."""
    images, labels = read_digits()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images[0].tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f"
    assert hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest() == "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"


def test_digits_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = open_source("digits")
    assert source.counts().sum(1).tolist() == [1437, 360]
    assert source.counts()[1].tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    image_folder(tmp_path / "digits", {"a": 1, "b": 1})
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").classes == ("a", "b"), "a folder of that name goes first"


def _hashes(labels: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, len(labels), np.uint64, endpoint=False)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(2, 60), min_size=2, max_size=6), fraction=st.floats(0.02, 0.9), seed=st.integers(0, 1000))
def test_split_by_content_is_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    val = split_by_content(_hashes(labels, seed), labels, fraction, num_classes=len(counts))
    for label, count in enumerate(counts):
        chosen = int(val[labels == label].sum())
        assert 1 <= chosen <= count - 1
        assert abs(chosen - min(max(count * fraction, 1), count - 1)) <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), added=st.integers(1, 20))
def test_added_images_move_few_others(seed: int, added: int) -> None:
    labels = np.repeat(np.arange(3), 100).astype(np.int32)
    hashes = _hashes(np.zeros(300 + added), seed)
    more = np.concatenate([labels, np.full(added, 1, np.int32)])
    before = split_by_content(hashes[:300], labels, 0.2, num_classes=3)
    after = split_by_content(hashes, more, 0.2, num_classes=3)[:300]
    assert (before != after).sum() <= added + 3


def test_copies_go_together_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    contents, labels = rng.integers(0, 50, 400), rng.integers(0, 4, 400).astype(np.int32)  # copies, also under other labels
    hashes = _hashes(np.zeros(50), 1)[contents]
    val = split_by_content(hashes, labels, 0.3, num_classes=4)
    for content in range(50):
        assert len(set(val[contents == content].tolist())) <= 1
    assert 0.25 < val.mean() < 0.35
    order = rng.permutation(400)
    np.testing.assert_array_equal(split_by_content(hashes[order], labels[order], 0.3, num_classes=4), val[order])


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (32, 32, 3), (200, 150, 3), (1, 65_600)])
def test_stored_png_is_lossless(shape: tuple[int, ...]) -> None:
    from dtl.data.decoding.decode import decode

    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    if max(shape) > 65_535:
        import io

        from PIL import Image

        with Image.open(io.BytesIO(store_png(image))) as opened:
            np.testing.assert_array_equal(np.asarray(opened), image)
    else:
        np.testing.assert_array_equal(decode(store_png(image)), rgb)
    assert store_png(pixels(2, 2)).startswith(b"\x89PNG")
