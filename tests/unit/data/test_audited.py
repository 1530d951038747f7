"""What `data.audit` does to the images of a run: exactly what stands in its column action."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_images import image_folder

from dtl.config.models import DataConfig, GroupConfig
from dtl.data.audited import AUDITED_NAME, COLUMNS, names_in, read_actions, write_ledger
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import Splits, open_splits
from dtl.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos") / "photos"
    for seed, (split, count) in enumerate({"train": 12, "val": 6}.items()):
        image_folder(place / split, {"a": count, "b": count}, seed=seed)
    return place


def audit_csv(tmp_path: Path, *rows: tuple[str, str, str], header: str = ",".join(COLUMNS)) -> str:
    """(path, other, action)"""
    path = tmp_path / "audit.csv"
    path.write_text("\n".join([header, *(f"{one},label,0.9,{other},b,{action}" for one, other, action in rows)]) + "\n")
    return str(path)


def opened(tmp_path: Path, train: Path, file: str | None, **data: object) -> tuple[Splits, list[str]]:
    lines: list[str] = []
    config = DataConfig(train=str(train), audit=file, cache_dir=str(tmp_path.parent / "cache"), **data)
    return open_splits(config, progress=False, log=lambda line: None, notes=lines.append), lines


def names(shards: Shards) -> list[str]:
    return [shards.name(sample) for sample in range(shards.num_samples)]


def labels(shards: Shards) -> dict[str, str]:
    return {name: shards.classes[label] for name, label in zip(names(shards), shards.labels.tolist())}


def test_what_is_set_is_honoured_and_nothing_else(tmp_path: Path, photos: Path) -> None:
    before, _ = opened(tmp_path, photos, None)
    train, val = names(before.train), names(before.val)
    file = audit_csv(tmp_path, (train[0], "", "drop"), (train[1], "", "relabel:b"), (train[2], train[3], ""), (train[4], "", "keep"), (val[0], "", "drop"))
    after, lines = opened(tmp_path, photos, file)
    assert lines == [f"data.audit {file}: 2 dropped (train 1, val 1); 1 relabelled (train 1)"]
    assert names(after.train) == train[1:]
    assert names(after.val) == val[1:]
    assert labels(after.train) == {name: "b" if name == train[1] else label for name, label in labels(before.train).items() if name != train[0]}
    assert after.train.dataset_id != before.train.dataset_id
    assert after.train.manifest.class_counts == tuple(np.bincount(after.train.labels, minlength=2).tolist())
    assert after.train.read([0]) == before.train.read([1])  # the images are what they were
    again, _ = opened(tmp_path, photos, file)
    assert again.ids() == after.ids()
    write_ledger(after.all(), tmp_path / AUDITED_NAME)
    found = [json.loads(line) for line in (tmp_path / AUDITED_NAME).read_text().splitlines()]
    assert [(one["split"], one["path"], one["action"], one.get("to")) for one in found] == [
        ("train", train[0], "drop", None),
        ("train", train[1], "relabel", "b"),
        ("val", val[0], "drop", None),
    ]


def test_images_are_held_out_of_what_is_left(tmp_path: Path, photos: Path) -> None:
    before, _ = opened(tmp_path, photos / "train", None, val_fraction=0.25)
    val = names(before.val)
    every = sorted([*names(before.train), *val])
    file = audit_csv(tmp_path, (every[0], "", "drop"), (every[-1], "", "relabel:a"), (val[0], "", "drop"))
    splits, _ = opened(tmp_path, photos / "train", file, val_fraction=0.25, test_fraction=0.25)
    left = {name for shards in splits.all().values() for name in names(shards)}
    assert left == set(every) - {every[0], val[0]}
    assert sum(shards.num_samples for shards in splits.all().values()) == len(left)
    assert next(labels(shards)[every[-1]] for shards in splits.all().values() if every[-1] in names(shards)) == "a"
    again = Shards.open(splits.train.place)
    assert names(again) == names(splits.train)
    whole, _ = opened(tmp_path, photos / "train", None, val_fraction=0.25)
    by_name = dict(zip(names(whole.train), whole.train.read(range(whole.train.num_samples))))
    same = [sample for sample, name in enumerate(names(splits.train)) if name in by_name]
    assert splits.train.read(same) == [by_name[names(splits.train)[sample]] for sample in same]
    write_ledger(splits.all(), tmp_path / AUDITED_NAME)
    assert len((tmp_path / AUDITED_NAME).read_text().splitlines()) == 3


@pytest.mark.parametrize("given", [None, GroupConfig(regex=r"(\d)\.")])
def test_grouped_images_are_held_out_together(tmp_path: Path, photos: Path, given: GroupConfig | None) -> None:
    every = sorted(names(opened(tmp_path, photos / "train", None, val_fraction=0.25)[0].train))
    chain = [every[0], every[3], every[7], every[-1]]
    file = audit_csv(tmp_path, *((one, other, "group") for one, other in pairwise(chain)))
    splits, lines = opened(tmp_path, photos / "train", file, val_fraction=0.25, group=given)
    assert any(line == f"data.audit {file}: 4 grouped (train 4)" for line in lines)
    sides = [{name for name in chain if name in names(shards)} for shards in (splits.train, splits.val)]
    assert sorted(map(len, sides)) == [0, 4]
    assert splits.train.num_samples + splits.val.num_samples == 24


def test_a_group_in_two_given_splits_is_refused(tmp_path: Path, photos: Path) -> None:
    splits, _ = opened(tmp_path, photos, None)
    file = audit_csv(tmp_path, (names(splits.train)[0], names(splits.val)[0], "group"))
    with pytest.raises(UserError, match=r"1 group of images is in more than one split: .*--data.group-check warn"):
        opened(tmp_path, photos, file)
    _, lines = opened(tmp_path, photos, file, group_check="warn")
    assert any("results on such images are too good" in line for line in lines)


def test_an_audit_of_other_images_is_refused(tmp_path: Path, photos: Path) -> None:
    first = names(opened(tmp_path, photos, None)[0].train)[0]
    for rows, message in {
        (("x/1.jpg", "", "drop"),): r"not one of its 1 path is in .*: it is the audit of another data set$",
        (("x/1.jpg", "", ""),): r"it is the audit of another data set$",
        (
            (first, "", "drop"),
            ("x/1.jpg", "", "drop"),
        ): r"has an action for 1 image that .* does not have, such as 'x/1.jpg': run dtl audit again, or take these rows out$",
        ((first, "x/2.jpg", "group"),): r"for 1 image that .*'x/2.jpg'",
        ((first, "", "relabel:c"),): r"line 2: there is no class 'c' to relabel",
    }.items():
        with pytest.raises(UserError, match=message):
            opened(tmp_path, photos, audit_csv(tmp_path, *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.jpg", "", "dorp")], r"line 2: unknown action 'dorp'; it is drop, relabel:CLASS, group, keep or empty; did you mean 'drop'\?$"),
        ([("a.jpg", "", "relabel:")], r"line 2: relabel: needs a class"),
        ([("a.jpg", "", "group")], r"line 2: the action group needs another image"),
        ([("a.jpg", "", "drop"), ("a.jpg", "", "relabel:b")], r"line 2 says drop for a.jpg, and line 3 says relabel:b; keep one"),
        ([("", "", "drop")], r"line 2: no path$"),
    ],
)
def test_an_action_that_cannot_be_honoured_is_refused(tmp_path: Path, rows: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(UserError, match=f"^data.audit .*{message}"):
        read_actions(audit_csv(tmp_path, *rows))


def test_a_file_that_is_no_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no column 'other', 'action': its first line must be path,kind,score,other,suggestion,action"):
        read_actions(audit_csv(tmp_path, header="path,label"))
    with pytest.raises(UserError, match=r"^data.audit .*cannot be read: No such file"):
        read_actions(str(tmp_path / "none.csv"))


def test_a_path_of_two_splits_needs_its_split(tmp_path: Path) -> None:
    for seed, split in enumerate(("one", "two")):
        image_folder(tmp_path / split, {"a": 3, "b": 3}, seed=seed)
    name = names(opened(tmp_path, tmp_path / "one", None, val=str(tmp_path / "two"))[0].train)[0]
    with pytest.raises(UserError, match=rf"train and val have an image '{name}' each: write train:{name} or val:{name}$"):
        opened(tmp_path, tmp_path / "one", audit_csv(tmp_path, (name, "", "drop")), val=str(tmp_path / "two"))
    splits, _ = opened(tmp_path, tmp_path / "one", audit_csv(tmp_path, (f"val:{name}", "", "drop")), val=str(tmp_path / "two"))
    assert (splits.train.num_samples, splits.val.num_samples) == (6, 5)
    assert names_in(splits.all())["val"][0].startswith("val:")
