"""Image folders: what is listed, left out and printed, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from tiny_images import encoded, image_folder

from dtl.data.sources.base import Source
from dtl.data.sources.open import open_source
from dtl.errors import UserError


def names(source: Source) -> list[str]:
    return [source.names[sample] for sample in range(source.num_samples)]


def notes(source: Source) -> str:
    return "\n".join(source.notes)


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
    assert source.split_names == ("train", "test" if val == "test" else "val")
    assert source.counts().tolist() == [[3, 2], [1, 1]]
    assert names(source)[-1] == f"{val}/b/0000.jpg"
    assert (f"'{val}' is used for validation" in notes(source)) == (val not in ("val", "test"))
    assert ("'test' is the test set" in notes(source)) == (val == "test")


def test_val_goes_before_test_and_is_told(tmp_path: Path) -> None:
    for seed, name in enumerate(["train", "test", "valid", "extra"]):
        image_folder(tmp_path / name, {"a": 2, "b": 2}, seed=seed)
    source = open_source(tmp_path)
    assert source.split_names == ("train", "val", "test")
    assert {name.split("/")[0] for name in names(source)} == {"train", "valid", "test"}
    assert "'valid' is used for validation, 'test' is the test set" in notes(source)
    assert "other folders than train, valid and test left out: 'extra'" in notes(source)


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
    with pytest.raises(UserError, match="1 class that the given class list does not have: 'c'; it has 'a', 'b'"):
        open_source(tmp_path, classes=["a", "b"])


def test_empty_class_folder_is_refused_or_left_out(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1, "c": 0})
    with pytest.raises(UserError, match="class folder 'c' holds no image; remove folders that are not classes"):
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
        with pytest.raises(UserError, match="without labels, use the task rotate"):
            open_source(tmp_path / folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_source(tmp_path / "empty", labelled=False)


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
    if case == "one image":
        return image_folder(root, {"only": 1})
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
        ("one class", r"photos has only one class, 'only'; a classifier needs two or more"),
        ("one image", r"photos has only one class, 'only'; a classifier needs two or more, and more than its one image"),
        ("train alone", r"has only one class, 'train'; did you mean .*photos/train, which has 2 folders\?"),
        (
            "loose images",
            r"has 1 image directly in it and no images in class folders; put each class in its own folder \(photos/CLASS/1.jpg\)",
        ),
        ("other files", r"holds no images, only other files \('a/x.txt'\)"),
        ("unknown in val", r"photos/val has images of 1 class that training does not have: 'wasp'; it has 'a', 'b'"),
        ("empty val", r"photos/val holds no images"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, case: str, message: str) -> None:
    root = _make(tmp_path / "photos", case)
    with pytest.raises(UserError, match=message) as error:
        open_source(root)
    assert "\n" not in str(error.value)
