"""How labels as they stand become class numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_images import encoded
from wds_tars import indexed, numbered, sample, with_json, write_tar

from dtl.commands import index as command
from dtl.data.shards.index import Shards
from dtl.data.wds.index import index_shards
from dtl.errors import UserError


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["0", " 2\n", "1"], ("0", "1", "2"), [0, 2, 1]),
        (["cat", "ant", "cat"], ("ant", "cat"), [1, 0, 1]),
        (["n02", "n01", "n010"], ("n01", "n010", "n02"), [2, 0, 1]),
        (["007", "1_0", "x"], ("007", "1_0", "x"), [0, 1, 2]),
    ],
)
def test_cls_is_a_number_or_a_name(tmp_path: Path, labels: list[str], classes: tuple[str, ...], expected: list[int]) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n, label in enumerate(labels) for m in sample(f"k{n}", label, seed=n)])
    shards = indexed(path)
    assert shards.classes == classes
    assert shards.labels.tolist() == expected
    assert shards.manifest.class_counts == tuple(np.bincount(expected, minlength=len(classes)).tolist())


def test_labels_in_json(tmp_path: Path) -> None:
    fields = [{"label": 1, "meta": {"name": "bee"}}, {"label": 0, "meta": {"name": "ant"}}, {"label": "1", "meta": {"name": "bee"}}]
    path = write_tar(tmp_path / "a.tar", [m for n, one in enumerate(fields) for m in with_json(f"k{n}", one, seed=n)])
    with pytest.raises(UserError, match=r"it has no .cls; .*--label-field with a field of its .json \(label, meta\)"):
        indexed(path)
    assert indexed(path, label_field="label").labels.tolist() == [1, 0, 1]
    assert command.run([str(path), "--label-field", "meta.name", "--out", str(tmp_path / "named"), "--quiet"]) == 0
    named = Shards.open(tmp_path / "named")
    assert (named.classes, named.labels.tolist()) == (("ant", "bee"), [1, 0, 1])
    for field, said in [("other", "has no field other; it has label, meta"), ("meta", "not a number or a name"), ("txt", "no field txt")]:
        with pytest.raises(UserError, match=said):
            indexed(path, label_field=field, existing="replace")


def test_labels_from_another_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(f"k{n}", 9, seed=n, kind_of=b"dog" if n % 2 else b"cat")])
    assert indexed(path, label_field="kind_of").labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("content", ["zero\none\ntwo\n", '["zero", "one", "two"]', '{"one": 1, "two": 2, "zero": 0}'])
def test_class_names_for_numbers(tmp_path: Path, content: str) -> None:
    numbered(tmp_path / "t" / "a.tar", 0, 6)
    names = tmp_path / ("names.json" if content[0] in "[{" else "names.txt")
    names.write_text(content)
    assert command.run([str(tmp_path / "t"), "--classes", str(names), "--quiet"]) == 0
    shards = Shards.open(tmp_path / "t")
    assert shards.classes == ("zero", "one", "two")
    assert shards.labels.tolist() == [0, 1, 2, 0, 1, 2]


REFUSED_LABELS = [
    (["0", "cat"], "some labels are numbers and some are names: 0 of sample k0, 'cat' of sample k1"),
    (["-1", "1"], "label -1 of sample k0 is negative"),
    (["0", "99999"], "labels go up to 99999 .sample k1., but only 2 different labels occur"),
    (["0", ""], r"a.tar: sample k1 at byte \d+: its .cls is empty"),
    (["0", "a\nb"], "its .cls has several lines"),
    (["0", "\udcff"], "its .cls is not text"),
]


@pytest.mark.parametrize(("labels", "said"), REFUSED_LABELS)
def test_labels_that_are_none(tmp_path: Path, labels: list[str], said: str) -> None:
    members = []
    for number, label in enumerate(labels):
        members += [(f"k{number}.jpg", encoded(seed=number)), (f"k{number}.cls", label.encode("utf-8", "surrogateescape"))]
    with pytest.raises(UserError, match=said):
        indexed(write_tar(tmp_path / "a.tar", members))


def test_labels_from_two_places_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("d/k0", 1), ("d/k1.jpg", encoded(seed=1))])
    with pytest.raises(UserError, match="the label of sample d/k0 is in its cls, that of sample d/k1 in its folder"):
        indexed(path)
    with pytest.raises(UserError, match="all keys are in one folder, 'd'"):
        indexed(path, label_field="folder")


def test_gaps_and_labels_from_one_are_told(tmp_path: Path) -> None:
    for labels, said in (((0, 3), "2 of the labels 0 to 3 have no sample"), ((1, 2), "the labels seem to start at 1")):
        path = write_tar(tmp_path / "a.tar", [m for n, label in enumerate(labels) for m in sample(f"k{n}", label, seed=n)])
        report = index_shards([path], processes=1, progress=False, existing="replace")
        assert said in report.notes[0]
