"""Names of splits: one set of rules for image folders, tars, packed shards, and packed shards elsewhere."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import encoded, image_folder

from dtl.data.open import packed_folder
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.sources.open import open_source
from dtl.data.sources.splits import SPLIT_WORDS, addresses_to_try, group_by_split, split_in, split_named
from dtl.data.verify import folders_to_verify
from dtl.data.wds.find import shards_for_training
from dtl.errors import UserError

NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}
CASES = (str.lower, str.capitalize, str.upper)
INSIDE = ("seg_{}", "{}_set", "my-{}-data", "{}.v2", "{}2017")
GRID = [(case(train), case(other)) for kind in ("val", "test") for train, other, case in product(NAMES["train"], NAMES[kind], CASES)]


IMAGE = encoded()


def classes_in(folder: Path) -> None:
    for name in ("ants", "bees"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.jpg").write_bytes(IMAGE)


# --- the names


def test_every_name_in_every_case() -> None:
    assert SPLIT_WORDS == NAMES
    for split, words in NAMES.items():
        for word, case in product(words, CASES):
            assert split_named(case(word)) == split_in(case(word)) == split
            for pattern in INSIDE:
                assert split_in(pattern.format(case(word))) == split
                assert split_named(pattern.format(case(word))) is None
            assert case(word) in addresses_to_try(split)


@pytest.mark.parametrize("name", ["retrain", "trainer", "trains", "contest", "testament", "evaluate", "device", "valley", "latest", "all", ""])
def test_parts_of_words_are_no_names(name: str) -> None:
    assert split_in(name) is None


@given(st.lists(st.text("abtrainsevl_-. 0", max_size=12), unique=True))
def test_whole_names_come_first_and_nothing_is_lost(names: list[str]) -> None:
    grouped = group_by_split(names)
    assert sorted(name for several in grouped.values() for name in several) == sorted(name for name in names if split_in(name))
    for several in grouped.values():
        whole = [split_named(name) is not None for name in several]
        assert whole == sorted(whole, reverse=True)


# --- image folders


@pytest.mark.parametrize("pattern", ["{}", *INSIDE])
@pytest.mark.parametrize("above", ["", "archive", "TRAIN_ME"])
def test_image_folders(tmp_path: Path, pattern: str, above: str) -> None:
    for number, words in enumerate(GRID):
        root, (train, other) = tmp_path / str(number), map(pattern.format, words)
        classes_in(root / above / train)
        classes_in(root / above / other)
        source = open_source(root)
        assert source.classes == ("ants", "bees")
        assert source.split_names == ("train", "test" if words[1].lower() in NAMES["test"] else "val"), "a test folder never validates"
        assert source.counts().tolist() == [[1, 1], [1, 1]]
        place = f"{above}/" if above else ""
        assert [source.names[0], source.names[2]] == [f"{place}{train}/ants/1.jpg", f"{place}{other}/ants/1.jpg"]


def test_three_splits_by_words(tmp_path: Path) -> None:
    for name in ("Seg_Train", "seg_dev", "seg_test"):
        classes_in(tmp_path / name)
    source = open_source(tmp_path)
    assert source.split_names == ("train", "val", "test")
    assert {"'seg_dev' is used for validation, 'seg_test' is the test set", "'Seg_Train' is used for training"} <= set(source.notes)


def test_folders_within_folders_of_the_same_name(tmp_path: Path) -> None:
    """As the archives of Intel's scenes unpack: seg_train/seg_train/CLASS, and images without classes beside them."""
    classes_in(tmp_path / "seg_train" / "seg_train")
    classes_in(tmp_path / "seg_test" / "seg_test")
    image_folder(tmp_path / "seg_pred", {"seg_pred": 2})
    source = open_source(tmp_path)
    assert source.classes == ("ants", "bees")
    assert source.split_names == ("train", "test")
    assert "other folders than seg_train and seg_test left out: 'seg_pred'" in source.notes


@pytest.mark.parametrize(
    "classes",
    [
        ("test_positive", "test_negative"),
        ("train_ticket", "test_tube"),
        ("training shoe", "dress", "eval-board"),
        ("train", "tram"),
        ("bullet_train", "test_tube", "val"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_classes_with_such_words_stay_classes(tmp_path: Path, classes: tuple[str, ...], nested: bool) -> None:
    for number, name in enumerate(classes):
        folder = tmp_path / name / f"maker{number}" if nested else tmp_path / name
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(encoded())
    source = open_source(tmp_path)
    assert source.classes == tuple(sorted(classes))
    assert source.split_names == ("all",)


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("others", [("test",), ("DEV",), ("val", "test"), ("training", "train")])
def test_splits_never_become_classes(tmp_path: Path, train: str, others: tuple[str, ...]) -> None:
    for name in {train, *others}:
        image_folder(tmp_path, {name: 2})
    with pytest.raises(UserError, match=r"has the splits .* has no class folders in it|has two folders for training|has one class only"):
        open_source(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_without_a_folder_for_training(tmp_path: Path, inside: bool) -> None:
    for name in ("val", "Test"):
        classes_in(tmp_path / name) if inside else image_folder(tmp_path, {name: 2})
    with pytest.raises(UserError, match=r"has only folders for val and test \('Test', 'val'\), and none for training; name the training folder train"):
        open_source(tmp_path)


def test_two_folders_that_might_be_train(tmp_path: Path) -> None:
    for name in ("old_train", "new_train", "new_test"):
        classes_in(tmp_path / name)
    with pytest.raises(UserError, match=r"has 2 folders for train: new_train, old_train; keep only one of them"):
        open_source(tmp_path)
    (tmp_path / "old_train").rename(tmp_path / "train")
    source = open_source(tmp_path)
    assert source.names[0] == "train/ants/1.jpg"
    assert "other folders than train and new_test left out: 'new_train'" in source.notes


@settings(max_examples=50, deadline=None)
@given(names=st.sets(st.sampled_from([case(word) for words in NAMES.values() for word in words for case in CASES]), min_size=1), nested=st.booleans())
def test_a_root_of_splits_has_no_classes_of_their_names(tmp_path_factory: pytest.TempPathFactory, names: set[str], nested: bool) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in names:
        classes_in(root / name) if nested else image_folder(root, {name: 1})
    try:
        source = open_source(root)
    except UserError:
        return
    assert source.classes == ("ants", "bees")
    assert source.split_names[:2] == ("train", "val")


# --- shards


@pytest.mark.parametrize("pattern", ["{}", *INSIDE])
@pytest.mark.parametrize("above", ["", "archive"])
def test_shards_below_a_folder(tmp_path: Path, pattern: str, above: str) -> None:
    """Of others as tars, of dtl with a manifest."""
    for number, words in enumerate(GRID):
        root, (train, other) = tmp_path / str(number), map(pattern.format, words)
        place = root / above
        for name in (train, other):
            (place / name).mkdir(parents=True)
            (place / name / "a-000.tar").touch()
        for split, name in (("train", train), ("val", other)):
            assert shards_for_training(root, split) == [place / name / "a-000.tar"]
            assert packed_folder(root, split) is None
        for name in (train, other):
            (place / name / MANIFEST_NAME).touch()
        for split, name in (("train", train), ("val", other)):
            assert packed_folder(root, split) == place / name
        assert folders_to_verify(root) == [place / train, place / other]


@pytest.mark.parametrize("pattern", ["{}-000.tar", "data_{}_1.tar", "{}.tar"])
def test_tars_side_by_side(tmp_path: Path, pattern: str) -> None:
    for number, words in enumerate(GRID):
        root, (train, other) = tmp_path / str(number), map(pattern.format, words)
        root.mkdir()
        for name in (train, other):
            (root / name).touch()
        assert shards_for_training(root, "train") == [root / train]
        assert shards_for_training(root, "val") == [root / other]


def test_val_goes_before_test(tmp_path: Path) -> None:
    for name in ("train", "test", "my_eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).touch()
        (tmp_path / name / "a.tar").touch()
    assert packed_folder(tmp_path, "val") == tmp_path / "my_eval"
    assert shards_for_training(tmp_path, "val") == [tmp_path / "my_eval" / "a.tar"]


def test_shards_without_the_split(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").touch()
    with pytest.raises(UserError, match=r"holds the shards of train, but none of val"):
        shards_for_training(tmp_path, "val")
    (tmp_path / "train" / MANIFEST_NAME).touch()
    with pytest.raises(UserError, match=r"holds packed shards of train, but none of val"):
        packed_folder(tmp_path, "val")


def test_a_class_that_keeps_its_archive_holds_no_shards(tmp_path: Path) -> None:
    image_folder(tmp_path, {"test_positive": 2, "train_ticket": 2})
    for name in ("test_positive", "train_ticket"):
        (tmp_path / name / "images.tar").touch()
    assert shards_for_training(tmp_path, "train") is None
    assert open_source(tmp_path).classes == ("test_positive", "train_ticket")
