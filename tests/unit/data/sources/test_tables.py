"""Parquet and Arrow files of an image data set, as `datasets` and the hub keep them, are packed; whatever is wrong with one is one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packed_folders import hashes, pack
from tiny_images import encoded, image_folder

from dtl.data.shards.index import Shards
from dtl.data.sources import tables
from dtl.data.sources.open import open_source
from dtl.errors import UserError

pa = pytest.importorskip("pyarrow", reason="an extra: pip install pyarrow")
import pyarrow.parquet as pq  # noqa: E402

IMAGES = [encoded(height=10 + number % 5, width=12, seed=number) for number in range(12)]
NAMES = ("wasp", "ant", "bee")


def table(labels: Sequence[Any], *, images: Sequence[Any] = IMAGES, names: Sequence[str] | None = NAMES, paths: bool = True, **more: Sequence[Any]) -> Any:
    """As `datasets` writes it: {bytes, path}, ClassLabel names in the schema's metadata."""
    rows = [{"bytes": data, "path": f"photos/{number}.jpg" if paths else None} for number, data in zip(range(len(labels)), images)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(rows, struct), "label": pa.array(list(labels)), **{name: pa.array(values) for name, values in more.items()}}
    found = pa.table(columns)
    if names is None:
        return found
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, rows: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(rows, path, **options)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=5)
    return path


def labels_of(folder: Path) -> dict[bytes, str]:
    shards = Shards.open(folder)
    images = shards.read(range(shards.num_samples))
    return {data: shards.classes[int(label)] for data, label in zip(images, shards.labels) if isinstance(data, bytes)}


LABELS = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2]
EXPECTED = {data: NAMES[label] for data, label in zip(IMAGES, LABELS)}


@pytest.mark.parametrize("name", ["all.parquet", "all.arrow", "hub/data/train-00000-of-00001.parquet", "saved/data-00000-of-00001.arrow"])
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_are_packed_with_their_labels(tmp_path: Path, name: str, processes: int) -> None:
    file = write(tmp_path / name, table(LABELS, note=list(range(12))))
    source = file if "/" not in name else tmp_path / name.split("/")[0]
    report = pack(source, tmp_path / "out", processes=processes)
    assert report.classes == NAMES, "in the order of the metadata"
    assert "column not used: 'note'" in report.notes
    folder = tmp_path / "out" if (tmp_path / "out/manifest.json").exists() else tmp_path / "out/train"
    assert labels_of(folder) == EXPECTED
    shards = Shards.open(folder)
    assert sorted(str(shards.path(sample)) for sample in range(12))[3].endswith(f"{file.name}/000003/3.jpg"), "groups by regex may need the name that it had"


def test_the_order_of_the_rows_is_the_packed_identity(tmp_path: Path) -> None:
    """However the rows are cut into groups and files, and compressed, the same set comes of it."""
    whole = write(tmp_path / "a/train.parquet", table(LABELS))
    pack(whole.parent, tmp_path / "one")
    write(tmp_path / "b/train-00000-of-00002.parquet", table(LABELS).slice(0, 7), row_group_size=3, compression="zstd")
    write(tmp_path / "b/train-00001-of-00002.parquet", table(LABELS).slice(7), row_group_size=1, use_dictionary=False)
    pack(tmp_path / "b", tmp_path / "two")
    first, second = hashes(tmp_path / "one/train"), hashes(tmp_path / "two/train")
    assert first["index.bin"] == second["index.bin"]
    assert {name: value for name, value in first.items() if name.endswith(".tar")} == {name: value for name, value in second.items() if name.endswith(".tar")}


@pytest.mark.parametrize("place", ["{}.parquet", "data/{}-00000-of-00001.parquet", "default/{}/0000.parquet", "{}/data-00000-of-00001.arrow"])
def test_splits(tmp_path: Path, place: str) -> None:
    for split, part in (("train", slice(0, 8)), ("validation", slice(8, 10)), ("test", slice(10, 12))):
        write(tmp_path / "set" / place.format(split), table(LABELS[part], images=IMAGES[part]))
    report = pack(tmp_path / "set", tmp_path / "out")
    assert [(split.split, split.num_samples) for split in report.splits] == [("train", 8), ("val", 2), ("test", 2)]
    assert labels_of(tmp_path / "out/test") == dict(list(EXPECTED.items())[10:])


def test_labels_as_text_or_numbers_without_names(tmp_path: Path) -> None:
    texts = open_source(write(tmp_path / "a.parquet", table([NAMES[label] for label in LABELS], names=None)))
    assert texts.classes == ("ant", "bee", "wasp")
    coded = table(LABELS, names=None).append_column("category", pa.array([NAMES[label] for label in LABELS]).dictionary_encode())
    assert open_source(write(tmp_path / "b.parquet", coded.drop_columns("label"))).classes == ("ant", "bee", "wasp")
    numbers = open_source(write(tmp_path / "c.parquet", table([10 * label for label in LABELS], names=None)))
    assert numbers.classes == ("0", "10", "20")
    assert open_source(tmp_path / "a.parquet", classes=("wasp", "bee", "ant", "fly")).classes == ("wasp", "bee", "ant", "fly")


def test_a_split_without_labels_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "set/train.parquet", table(LABELS[:8]))
    write(tmp_path / "set/test.parquet", table([-1] * 4, images=IMAGES[8:]))
    source = open_source(tmp_path / "set")
    assert source.split_names == ("train",)
    assert "'test' is left out: its 4 rows have no labels" in source.notes
    write(tmp_path / "set/test.parquet", table([-1, 1, 2, 0], images=IMAGES[8:]))
    with pytest.raises(UserError, match=r"test.parquet, row 0: no label \(column 'label'\); 1 of 4 rows have none"):
        open_source(tmp_path / "set")


def bad(rows: Any) -> Any:
    return lambda path: write(path, rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"PAR1 and no more"), "cannot be read: "),
        (lambda path: path.write_bytes(b""), "cannot be read: "),
        (bad(table(LABELS).drop_columns("image")), "which column is the image\\? It has 'label'; name it with --data.columns path=COLUMN"),
        (bad(table(LABELS, names=None).drop_columns("label")), "which column is the label\\? It has 'image'; name it with --data.columns label=COLUMN"),
        (bad(table(LABELS, names=NAMES[:2])), "labels go from 0 to 2, but its metadata names 2 classes"),
        (bad(table(LABELS, names=("a", "a", "b"))), "are not different texts"),
        (bad(table([0.5] * 12, names=None)), "the column 'label' holds double, not a label"),
        (bad(table([1] * 12, names=None)), "has only one class, '1'"),
        (bad(table(LABELS).slice(0, 0)), "no row has the 3 labels 'wasp', 'ant', 'bee'; leave such classes out with --data.on-error skip"),
        (bad(pa.table({"image": ["a", "b"], "label": [0, 1]})), "the column 'image' holds string, not the bytes of images"),
        (bad(pa.table({"image": pa.array([[1]], pa.list_(pa.int8())), "label": [0]})), "holds list<.*, not the bytes of images"),
        (bad(table(LABELS).replace_schema_metadata({"huggingface": "[" * 10_000})), "the schema's metadata"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as raised:
        open_source(tmp_path / "a.parquet")
    assert "a.parquet" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_without_an_image_and_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table(LABELS, images=[*IMAGES[:5], None, *IMAGES[6:]]))
    with pytest.raises(UserError, match=r"a.parquet, row 5: no bytes of an image, only a path or nothing"):
        pack(tmp_path / "a.parquet", tmp_path / "out")
    write(tmp_path / "b.parquet", table(LABELS, images=[*IMAGES[:5], b"no image", *IMAGES[6:]]))
    with pytest.raises(UserError, match=r"1 of 12 images cannot be read: b.parquet/000005/5.jpg: "):
        pack(tmp_path / "b.parquet", tmp_path / "out")
    assert pack(tmp_path / "b.parquet", tmp_path / "out", on_error="skip").splits[0].num_samples == 11
    write(tmp_path / "c.parquet", table(LABELS, images=[*IMAGES[:5], bytes(2000), *IMAGES[6:]]))
    with pytest.raises(UserError, match=r"c.parquet/000005/5.jpg: it has 2,000 bytes, more than the 1,500 that are allowed"):
        pack(tmp_path / "c.parquet", tmp_path / "out2", max_file_bytes=1500)


def test_a_small_file_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary repeats one value for nothing."""
    image = encoded(height=100, width=100)
    write(tmp_path / "a.parquet", table([0, 1] * 5000, images=[image] * 10_000, paths=False, names=("a", "b")))
    assert (tmp_path / "a.parquet").stat().st_size * 20 < 10_000 * len(image)
    monkeypatch.setattr(tables, "_LEAST_LIMIT", 1 << 20)
    monkeypatch.setattr(tables, "_MOST_TIMES", 10)
    with pytest.raises(UserError, match=r"a.parquet holds more than its size and its header say"):
        pack(tmp_path / "a.parquet", tmp_path / "out")
    write(tmp_path / "b.parquet", pa.table({"image": pa.array([b"x"] * 100_000), "label": pa.array([0] * 100_000)}))
    with pytest.raises(UserError, match=r"b.parquet says that it has 100,000 rows in .* bytes, which cannot hold an image each"):
        open_source(tmp_path / "b.parquet")


def test_splits_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path / "set/train.parquet", table(LABELS))
    write(tmp_path / "set/more.parquet", table(LABELS))
    with pytest.raises(UserError, match=r"set: more.parquet has no split in its name \(train, val, test\), but other files have"):
        open_source(tmp_path / "set")
    (tmp_path / "set/more.parquet").unlink()
    write(tmp_path / "set/val.parquet", table(LABELS, names=("a", "b", "c")))
    with pytest.raises(UserError, match=r"set: its files do not agree about the names of their labels"):
        open_source(tmp_path / "set")


def test_an_image_folder_with_a_table_beside_it_stays_one(tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", {"a": 2, "b": 2})
    write(tmp_path / "photos/metadata.parquet", table(LABELS))
    assert open_source(tmp_path / "photos").kind == "image folder"


def test_columns_by_their_names(tmp_path: Path) -> None:
    rows = table(LABELS, other=[9 - label for label in LABELS]).rename_columns(["photo", "label", "other"]).replace_schema_metadata(None)
    file = write(tmp_path / "a.parquet", rows)
    assert open_source(file, columns={"path": "photo", "label": "other"}).classes == ("7", "8", "9")
    with pytest.raises(UserError, match=r"a.parquet has no column 'Photo'; it has 'photo', 'label', 'other'"):
        open_source(file, columns={"path": "Photo"})


def test_as_datasets_writes_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="brings pandas and more: pip install datasets switches this on")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": LABELS}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "test": made.select(range(4))}).save_to_disk(str(tmp_path / "both"))
    for name, split in (("a.parquet", ""), ("saved", ""), ("both", "train")):
        pack(tmp_path / name, tmp_path / "out" / name)
        assert labels_of(tmp_path / "out" / name / split) == EXPECTED
    assert len(labels_of(tmp_path / "out/both/test")) == 4
