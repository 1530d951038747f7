"""The splits of a run, from what its config names."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from bad_server import Server
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_images import image_folder

from dtl.config.models import DataConfig
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import Splits, chosen_parts, content_id, open_splits
from dtl.errors import UserError


def opened(tmp_path: Path, **data: object) -> Splits:
    return open_splits(DataConfig(**{"cache_dir": str(tmp_path / "cache"), **data}), progress=False, log=lambda line: None)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, (split, count) in enumerate({"train": 12, "val": 6, "test": 4}.items()):
        image_folder(tmp_path / "photos" / split, {"a": count, "b": count}, seed=seed)
    return tmp_path / "photos"


def test_three_folders_are_three_splits(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos))
    assert {name: shards.num_samples for name, shards in splits.all().items()} == {"train": 24, "val": 12, "test": 8}
    again = open_splits(DataConfig(train=str(photos), cache_dir=str(tmp_path / "cache")), progress=False, found=splits.places())
    assert again.ids() == splits.ids()


def test_a_test_set_named_by_itself(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos / "train"), val_fraction=0.25, test=str(photos / "test"))
    assert {name: shards.num_samples for name, shards in splits.all().items()} == {"train": 18, "val": 6, "test": 8}
    assert opened(tmp_path, train=str(photos / "train"), val=str(photos / "val")).test is None


def test_images_are_known_by_content_in_any_order(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos))
    alone = opened(tmp_path, train=str(photos / "train"), val=str(photos / "test"))
    assert splits.test is not None
    assert content_id(splits.test) == content_id(alone.val) != content_id(splits.val)


def test_a_test_set_of_other_classes(tmp_path: Path, photos: Path) -> None:
    image_folder(tmp_path / "others", {"a": 2, "wasps": 2}, seed=9)
    with pytest.raises(UserError, match=r"others has images of 1 class that the given class list does not have: 'wasps'"):
        opened(tmp_path, train=str(photos), test=str(tmp_path / "others"))


# ---- held out of the training images


def images(shards: Shards) -> set[tuple[str | None, bytes]]:
    """Paths and bytes."""
    found = shards.read(range(shards.num_samples))
    assert all(isinstance(one, bytes) for one in found)
    return {(shards.path(sample), data) for sample, data in enumerate(found) if isinstance(data, bytes)}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """As most published sets are: train and test."""
    for seed, (split, count) in enumerate({"train": 130, "test": 5}.items()):
        image_folder(tmp_path / "two" / split, {"a": count, "b": count}, seed=seed)
    return tmp_path / "two"


def shape(splits: Splits) -> dict[str, list[int]]:
    return {name: list(shards.manifest.class_counts) for name, shards in splits.all().items()}


def test_a_test_set_never_validates(tmp_path: Path, two: Path) -> None:
    said: list[str] = []
    data = DataConfig(train=str(two), cache_dir=str(tmp_path / "cache"))
    splits = open_splits(data, progress=False, log=said.append)
    assert shape(splits) == {"train": [117, 117], "val": [13, 13], "test": [5, 5]}
    why = "because there are test images and no validation images, and test images choose nothing"
    assert said[-1] == f"26 of 260 training images (10.0%, stratified) are used as validation images, {why}"
    assert {path.split("/")[0] for path, _ in images(splits.train) | images(splits.val) if path} == {"train"}
    assert not images(splits.train) & images(splits.val)
    whole = Shards.open(splits.train.folder)
    assert images(splits.train) | images(splits.val) == images(whole)
    again = open_splits(data, progress=False, found=splits.places())
    assert again.ids() == splits.ids()
    assert images(pickle.loads(pickle.dumps(again.val))) == images(splits.val)


def test_at_least_twenty_and_at_most_half(tmp_path: Path) -> None:
    for number, (count, val) in enumerate(((30, 10), (15, 8))):
        root = tmp_path / str(number)
        image_folder(root / "train", {"a": count, "b": count})
        image_folder(root / "test", {"a": 2, "b": 2}, seed=1)
        assert shape(opened(tmp_path, train=str(root)))["val"] == [val, val] if number == 0 else [7, 8]


@pytest.mark.parametrize("form", ["folder", "packed", "tars", "list"])
def test_every_form_of_source(tmp_path: Path, two: Path, form: str) -> None:
    source = two
    if form in ("packed", "tars"):
        pack(two, tmp_path / "packed", processes=1, progress=False)
        source = tmp_path / "packed"
    if form == "tars":
        for file in source.rglob("*"):
            if file.suffix in (".json", ".bin"):
                file.unlink()
    if form == "list":
        rows = [f"{file.relative_to(two)},{file.parent.name},{file.parent.parent.name}" for file in sorted(two.rglob("*.jpg"))]
        source = two / "list.csv"
        source.write_text("\n".join(["path,label,split", *rows]))
    splits = opened(tmp_path, train=str(source))
    assert shape(splits) == {"train": [117, 117], "val": [13, 13], "test": [5, 5]}
    reference = opened(tmp_path, train=str(two))
    for name, shards in splits.all().items():  # by content: the same images in every form
        assert content_id(shards) == content_id(reference.all()[name])


def test_a_remote_folder_and_its_copy_when_the_server_is_away(tmp_path: Path, two: Path) -> None:
    pack(two, tmp_path / "www", processes=1, progress=False)
    near = opened(tmp_path, train=str(tmp_path / "www"))
    with Server(tmp_path / "www") as server:
        far = opened(tmp_path, train=server.url, retries=0)
        assert shape(far) == {"train": [117, 117], "val": [13, 13], "test": [5, 5]}
        assert far.ids() == near.ids()
        assert images(far.val) == images(near.val)
        assert images(far.train) == images(near.train)
        assert set(server.downloads().values()) == {1}, "train and val are parts of the same shards"
        url = server.url
    away = opened(tmp_path, train=url, retries=0, timeout=1.0)
    assert away.ids() == near.ids()


def test_fractions(tmp_path: Path, two: Path) -> None:
    train = str(two / "train")
    both = opened(tmp_path, train=train, test_fraction=0.2, val_fraction=0.1)
    assert shape(both) == {"train": [91, 91], "val": [13, 13], "test": [26, 26]}
    more = opened(tmp_path, train=train, test_fraction=0.2, val_fraction=0.3)
    assert content_id(more.test or more.val) == content_id(both.test or both.val)  # the test set stays as it is
    alone = opened(tmp_path, train=train, test_fraction=0.2)
    assert shape(alone) == {"train": [93, 93], "val": [11, 11], "test": [26, 26]} or sum(shape(alone)["val"]) == 21
    named = opened(tmp_path, train=train, val=str(two / "test"), test_fraction=0.2)
    assert shape(named) == {"train": [104, 104], "val": [5, 5], "test": [26, 26]}
    assert shape(opened(tmp_path, train=str(two), val_fraction=0.2))["val"] == [26, 26]
    assert shape(opened(tmp_path, train=train, val_fraction=0.2))["val"] == [26, 26]  # as it always was: packed apart
    with pytest.raises(UserError, match=r"two has a test set of its own: leave out data.test_fraction"):
        opened(tmp_path, train=str(two), test_fraction=0.2)


def test_what_is_named_for_validation_validates(tmp_path: Path, two: Path) -> None:
    """The default of before: a test folder beside train is validated on, if it is named."""
    splits = opened(tmp_path, train=str(two), val=str(two))
    assert shape(splits) == {"train": [130, 130], "val": [5, 5]}
    assert shape(opened(tmp_path, train=str(two), val=str(two / "test"))) == shape(splits)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=4, max_size=120),
    content=st.lists(st.integers(0, 1 << 20), min_size=120, max_size=120),
    test=st.sampled_from([None, 0.1, 0.25]),
    val=st.sampled_from([None, 0.1, 0.3]),
    order=st.randoms(use_true_random=False),
)
def test_every_sample_is_on_one_side_whatever_the_order(
    labels: list[int], content: list[int], test: float | None, val: float | None, order: random.Random
) -> None:
    samples = [(label, number) for label, number in zip(labels, content)]

    def parts(samples: list[tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
        column = np.array([number for _, number in samples], np.uint32)
        fake = SimpleNamespace(
            num_samples=len(samples), num_classes=4, labels=np.array([label for label, _ in samples], np.int32),
            sizes=column, crcs=column, shapes=lambda exif: (column.astype(np.int64), column.astype(np.int64), np.ones_like(column)),
        )  # fmt: skip
        try:
            found = chosen_parts(cast("Shards", fake), {**({} if test is None else {"test": test}), "val": val})
        except UserError as error:
            assume("no class has two different images" not in str(error))
            raise
        assert np.array_equal(np.sum(list(found.values()), axis=0), np.ones(len(samples)))
        return {name: sorted(samples[at] for at in np.flatnonzero(chosen)) for name, chosen in found.items()}

    found = parts(samples)
    shuffled = samples[:]
    order.shuffle(shuffled)
    assert parts(shuffled) == found
    sides = {}
    for name, members in found.items():
        for _, number in members:
            assert sides.setdefault(number, name) == name  # copies of one image are on one side


# ---- folds


@pytest.mark.parametrize("more", [{}, {"val_fraction": 0.2}, {"group": {"regex": "([0-9]+)"}, "val_fraction": 0.2}], ids=["plain", "val", "groups"])
def test_every_image_is_held_out_once(tmp_path: Path, two: Path, more: dict[str, object]) -> None:
    root = {"train": str(two / "train"), "cache_dir": str(tmp_path / "cache"), **more}
    said: list[str] = []
    whole, seen = set[tuple[str | None, bytes]](), list[tuple[str | None, bytes]]()
    for number in (2, 3, 1):
        splits = open_splits(DataConfig(**root, fold={"number": number, "of": 3}), progress=False, log=said.append)  # type: ignore[arg-type]
        assert splits.test is not None
        parts = [images(shards) for shards in splits.all().values()]
        whole = set().union(*parts)
        assert sum(map(len, parts)) == len(whole) == 260
        seen += parts[2]
        if "group" not in more:
            assert shape(splits)["test"] in ([43, 43], [43, 44], [44, 43], [44, 44])
    assert set(seen) == whole
    assert len(seen) == 260
    assert any("are used as test images: fold 2 of 3" in line for line in said)


def test_a_run_on_all_images_validates_as_each_fold_does(tmp_path: Path, two: Path) -> None:
    said: list[str] = []
    data = DataConfig(train=str(two / "train"), cache_dir=str(tmp_path / "cache"), fold={"number": 0, "of": 5})  # type: ignore[arg-type]
    splits = open_splits(data, progress=False, log=said.append)
    assert shape(splits) == {"train": [117, 117], "val": [13, 13]}
    assert said[-1] == "26 of 260 training images (10.0%, stratified) are used as validation images, as in each fold"
    least = data.model_copy(update={"val_fraction": 0.001})
    assert shape(open_splits(least, progress=False, log=said.append)) == {"train": [129, 129], "val": [1, 1]}


def test_a_test_set_of_its_own_is_no_part_of_a_fold(tmp_path: Path, two: Path) -> None:
    said: list[str] = []
    data = {"train": str(two), "cache_dir": str(tmp_path / "cache")}
    splits = open_splits(DataConfig(**data, fold={"number": 1, "of": 2}), progress=False, log=said.append)  # type: ignore[arg-type]
    assert shape(splits)["test"] == [65, 65]
    assert f"the test set is fold 1 of 2: left out 10 test images that {two} has of its own" in said
    assert shape(opened(tmp_path, train=str(two), fold={"number": 0, "of": 2}))["test"] == [5, 5]
