"""Images that belong together: a group stands on one side of a split, whatever the order of files; bad input is one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import encoded

from dtl.cli import main
from dtl.config.models import DataConfig, GroupConfig
from dtl.data.groups import Groups, find_groups, folds_by_group, split_by_group
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import Splits, content_id, open_splits
from dtl.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 patients with five images each, of both classes: photos/a/p07_3.jpg."""
    for number in range(120):
        file = tmp_path / "photos" / "ab"[number % 2] / f"p{number // 5:02d}_{number % 5}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(height=10, width=12, seed=number))
    return tmp_path / "photos"


def opened(tmp_path: Path, said: list[str] | None = None, **data: Any) -> Splits:
    log: Callable[[str], None] = said.append if said is not None else (lambda line: None)
    return open_splits(DataConfig(**{"cache_dir": str(tmp_path / "cache"), **data}), progress=False, log=log)


def patients(shards: Shards) -> set[str]:
    return {str(shards.path(sample)).rpartition("/")[2][:3] for sample in range(shards.num_samples)}


PATIENT = {"regex": "/(p[0-9]+)_"}


def test_a_group_stands_on_one_side(tmp_path: Path, photos: Path) -> None:
    said: list[str] = []
    splits = opened(tmp_path, said, train=str(photos), val_fraction=0.2, test_fraction=0.2, group=PATIENT)
    assert splits.test is not None
    sides = [patients(shards) for shards in splits.all().values()]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 24
    assert (splits.train.num_samples, splits.val.num_samples, splits.test.num_samples) == (70, 25, 25)
    assert said[-2:] == [
        "25 of 120 training images (20.8%, 5 of 24 groups, 18.3% to 23.3% of a class) are used as test images",
        "25 of 120 training images (20.8%, 5 of 24 groups, 18.3% to 23.3% of a class) are used as validation images",
    ]


def test_a_file_and_a_column_give_the_same_split(tmp_path: Path, photos: Path) -> None:
    reference = opened(tmp_path, train=str(photos), val_fraction=0.2, group=PATIENT)
    rows = [f"{file.relative_to(photos)},{file.name[:3]}" for file in sorted(photos.rglob("*.jpg"))]
    (tmp_path / "groups.csv").write_text("\n".join(["path,group", *rows]))
    by_file = opened(tmp_path, train=str(photos), val_fraction=0.2, group={"file": str(tmp_path / "groups.csv")})
    (photos / "list.csv").write_text("\n".join(["path,patient,label", *(f"{row},{row[0]}" for row in rows)]))
    by_column = opened(tmp_path, train=str(photos / "list.csv"), val_fraction=0.2, group={"column": "patient"})
    for splits in (by_file, by_column):
        assert {name: content_id(shards) for name, shards in splits.all().items()} == {name: content_id(shards) for name, shards in reference.all().items()}


def test_a_list_of_other_images_is_no_source_of_groups(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos), val_fraction=0.2)
    (photos / "list.csv").write_text("path,patient,label\na/other.jpg,p,a\n")
    with pytest.raises(UserError, match=r"column patient: the list lists none of the [0-9]+ images of .*list.csv, such as .*; its first path is .a/other.jpg"):
        find_groups(splits.val, GroupConfig(column="patient"), str(photos / "list.csv"))


def test_a_column_is_stored_when_the_list_is_packed(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{file.relative_to(photos)},{file.parent.name},{file.name[:3]}" for file in sorted(photos.rglob("*.jpg"))]
    (photos / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    assert main(["pack", str(photos / "list.csv"), str(tmp_path / "packed"), "--group-column", "patient", "--quiet"]) == 0
    (photos / "list.csv").unlink()
    packed = opened(tmp_path, train=str(tmp_path / "packed"), val_fraction=0.2, group={"column": "patient"})
    reference = opened(tmp_path, train=str(photos), val_fraction=0.2, group=PATIENT)
    assert content_id(packed.val) == content_id(reference.val)
    groups = find_groups(packed.val, GroupConfig(column="patient"), "packed")
    assert {groups.names[code] for code in groups.codes} == patients(packed.val)
    with pytest.raises(UserError, match=r"data.group.column camera: .*packed was packed with the groups of column 'patient'"):
        opened(tmp_path, train=str(tmp_path / "packed"), val_fraction=0.2, group={"column": "camera"})
    (tmp_path / "packed" / "groups.bin").unlink()  # as an older dtl has packed it
    assert Shards.open(tmp_path / "packed").num_samples == 120
    with pytest.raises(UserError, match=r"data.group.column patient: .*packed has no groups stored: pack the list with this column again"):
        opened(tmp_path, train=str(tmp_path / "packed"), val_fraction=0.2, group={"column": "patient"})


def test_what_packing_splits_off_are_whole_groups(tmp_path: Path, photos: Path) -> None:
    rows = [f"{file.relative_to(photos)},{file.parent.name},{file.name[:3]}" for file in sorted(photos.rglob("*.jpg"))]
    (photos / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    arguments = ["pack", str(photos / "list.csv"), str(tmp_path / "packed"), "--val-fraction", "0.2", "--quiet"]
    assert main(arguments) == 0
    torn = [patients(Shards.open(tmp_path / "packed" / split)) for split in ("train", "val")]
    assert torn[0] & torn[1], "by content: groups say nothing"
    assert main([*arguments, "--group-column", "patient", "--overwrite"]) == 0
    splits = opened(tmp_path, train=str(tmp_path / "packed"), group={"column": "patient"})  # refused if one were broken
    assert not patients(splits.train) & patients(splits.val)
    reference = opened(tmp_path, train=str(photos), val_fraction=0.2, group=PATIENT)
    assert content_id(splits.val) == content_id(reference.val)


def test_a_share_that_nobody_asked_for_has_twenty_images_where_groups_allow_it(tmp_path: Path) -> None:
    """Ten patients with six images each: three patients are nearer to the share of 20 images, and four are enough."""
    for split, first in (("train", 0), ("test", 100)):
        for number in range(first, first + 60):
            file = tmp_path / "photos" / split / "ab"[number % 2] / f"p{number // 6:02d}_{number % 6}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(height=10, width=12, seed=number))
    splits = opened(tmp_path, train=str(tmp_path / "photos"), group=PATIENT)
    assert splits.val.num_samples == 24
    assert not patients(splits.val) & patients(splits.train)


def test_splits_made_by_hand_are_checked(tmp_path: Path, photos: Path) -> None:
    for label in "ab":
        for file in (photos / label).glob("p0[45]_*.jpg"):
            (tmp_path / "val" / label).mkdir(parents=True, exist_ok=True)
            if "_0" in file.name or "_1" in file.name:
                file.rename(tmp_path / "val" / label / file.name)
    given = {"train": str(photos), "val": str(tmp_path / "val"), "group": PATIENT}
    message = r"^2 groups of images are in more than one split: 'p04' is in train \(./p04_.\.jpg\) and val \(./p04_.\.jpg\); move each group"
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **given)
    said: list[str] = []
    assert opened(tmp_path, said, **given, group_check="warn").val.num_samples == 4
    assert "2 groups of images are in more than one split" in said[-1]
    assert opened(tmp_path, **{**given, "group": None}).val.num_samples == 4


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"regex": "(p[0-9+_"}, r"data.group.regex '\(p\[0-9\+_' is not a regular expression: "),
        ({"regex": "p[0-9]+"}, r"data.group.regex 'p\[0-9\]\+' has no part in parentheses"),
        ({"regex": "(patient)"}, r"matches none of the 120 images of .*photos, such as '"),
        ({"regex": "(p0[0-4])_"}, r"does not match 95 of the 120 images"),
        ({"regex": "(jpg)"}, r"all 120 images are of one group, 'jpg', which cannot be on both sides of a split"),
        ({"regex": "([ab])/"}, r"none of the 2 groups can be held out: each has all images of a class; give --data.val FOLDER"),
        ({"column": "patient"}, r"data.group.column patient: .*photos has no groups stored: pack the list with this column again"),
        ({"file": "missing.csv"}, r"data.group.file missing.csv cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, photos: Path, group: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, train=str(photos), val_fraction=0.2, group=group)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,patient\na,b\n", r"its first line must name the columns path and group \(path,group\), got `path,patient`"),
        ("path,group\na/p00_0.jpg,\n", r"row 2: no path or no group"),
        ("path,group\na/p00_0.jpg,1\na/p00_0.jpg,2\n", r"row 3: a/p00_0.jpg is in two groups, '1' and '2'"),
        ("path,group\nelsewhere.jpg,1\n", r"lists none of the 120 images of .*photos, such as '.* and 117 more; its first path is 'elsewhere.jpg'"),
        ("path,group\n", r"lists no images"),
    ],
)
def test_group_files_that_are_refused(tmp_path: Path, photos: Path, text: str, message: str) -> None:
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, train=str(photos), val_fraction=0.2, group={"file": str(tmp_path / "g.csv")})


def test_a_column_that_the_list_has_not(tmp_path: Path, photos: Path) -> None:
    rows = [f"{file.relative_to(photos)},{file.parent.name},{file.name[:3]}" for file in sorted(photos.rglob("*.jpg"))]
    (photos / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    with pytest.raises(UserError, match=r"the column of groups 'pateint': .*list.csv has no such column; did you mean 'patient'"):
        opened(tmp_path, train=str(photos / "list.csv"), val_fraction=0.2, group={"column": "pateint"})
    with pytest.raises(ValueError, match="group needs one of regex, column and file"):
        GroupConfig(regex="(a)", column="b")


@settings(max_examples=80, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)), min_size=8, max_size=150),
    fraction=st.sampled_from([0.1, 0.2, 0.4]),
    order=st.randoms(use_true_random=False),
)
def test_groups_are_never_torn_and_the_order_decides_nothing(samples: list[tuple[int, int]], fraction: float, order: random.Random) -> None:
    def split(rows: list[tuple[int, int]]) -> set[str] | str:
        names = list(dict.fromkeys(f"g{group}" for group, _ in rows))
        groups = Groups(np.array([names.index(f"g{group}") for group, _ in rows]), tuple(names))
        labels = np.array([label for _, label in rows], np.int32)
        try:
            chosen = split_by_group(groups, labels, fraction, num_classes=3)
        except UserError as error:
            return str(error).split(":")[0]
        held_out = {names[code] for code in groups.codes[chosen]}
        assert not held_out & {names[code] for code in groups.codes[~chosen]}
        assert held_out
        assert set(labels[~chosen]) == set(labels), "each class can be learned"
        return held_out

    found = split(samples)
    shuffled = samples[:]
    order.shuffle(shuffled)
    again = split(shuffled)
    assert again == found or isinstance(found, str)


# ---- folds


@settings(max_examples=80)
@given(num_groups=st.integers(1, 40), num_classes=st.integers(1, 4), pure=st.booleans(), folds=st.integers(2, 6), seed=st.integers(0, 1000))
def test_folds_keep_groups_whole(num_groups: int, num_classes: int, pure: bool, folds: int, seed: int) -> None:
    generator, names = np.random.default_rng(seed), [f"class{label}" for label in range(num_classes)]
    codes = np.repeat(np.arange(num_groups), generator.integers(1, 9, num_groups)).astype(np.int64)
    labels = (generator.integers(0, num_classes, num_groups)[codes] if pure else generator.integers(0, num_classes, len(codes))).astype(np.int32)
    groups = Groups(codes, tuple(f"patient {code}" for code in range(num_groups)))
    owners = [len(np.unique(codes[labels == label])) for label in range(num_classes)]
    if num_groups < folds or any(0 < number < folds for number in owners):
        with pytest.raises(UserError, match=r"folds need as many groups|folds need images of each class .* has \d+ groups?: "):
            folds_by_group(groups, labels, folds, seed=seed, classes=names)
        return
    found = folds_by_group(groups, labels, folds, seed=seed, classes=names)
    assert set(found.tolist()) == set(range(folds)), "each image is in one fold, and none is empty"
    assert all(len(set(found[codes == code].tolist())) == 1 for code in range(num_groups))
    for label in np.unique(labels):
        assert len(set(found[labels == label].tolist())) > 1, "each run has images of each class to train on"
    order = generator.permutation(len(codes))
    np.testing.assert_array_equal(folds_by_group(Groups(codes[order], groups.names), labels[order], folds, seed=seed, classes=names), found[order])


def test_folds_of_groups_are_stratified() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(100), generator.integers(1, 9, 100)).astype(np.int64)
    labels = generator.choice(3, 100, p=[0.6, 0.3, 0.1])[codes].astype(np.int32)
    found = folds_by_group(Groups(codes, tuple(map(str, range(100)))), labels, 5, seed=0, classes=("a", "b", "c"))
    for label in range(3):
        sizes = np.bincount(found[labels == label], minlength=5)
        assert sizes.max() - sizes.min() <= 8, "no more than one group apart"


def test_a_fold_that_leaves_nothing_to_validate_on_is_refused_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    for number in range(8):
        file = tmp_path / "photos" / "ab"[number % 2] / f"p{number % 4}_{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(height=10, width=12, seed=number))
    assert main(["folds", "--config", "finetune", "--data.train", "photos", "--data.group.regex", "(p[0-9])", "--folds", "2"]) == 2
    line = "dtl: without fold 1 of 2: none of the 2 groups can be held out: each has all images of a class; give --data.val FOLDER\n"
    assert capfd.readouterr().err.endswith(line)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "5 folds need as many groups of images, but there are only 3"),
        (["--folds", "4", "--data.fold.seed", "7"], "4 folds need as many groups of images, but there are only 3"),
    ],
)
def test_more_folds_than_groups_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    assert main(["folds", "--config", "finetune", "--data.train", str(photos), "--data.group.regex", "/p([012])", *options]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"dtl: {line}"
    assert not (tmp_path / "runs").exists()
