"""The built-in digits, and the python batches of CIFAR."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_images import image_folder

from dtl.data.sources.base import Source
from dtl.data.sources.open import open_source
from dtl.errors import UserError


def names(source: Source) -> list[str]:
    return [source.names[sample] for sample in range(source.num_samples)]


def test_digits_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = open_source("digits")
    assert source.counts().sum(1).tolist() == [1437, 360]
    assert source.counts()[1].tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    image_folder(tmp_path / "digits", {"a": 1, "b": 1})
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").classes == ("a", "b"), "a folder of that name goes first"


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
    assert source.split_names == ("train", "test")
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


def _pointers() -> bytes:
    """A batch whose pickled type turns bytes into pointers to objects: NumPy's own unpickling follows them."""

    def name(module: str, word: str) -> bytes:
        return b"c" + module.encode() + b"\n" + word.encode() + b"\n"

    dtype = name("numpy", "dtype") + b"U\x02O8\x89\x88\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = name("numpy._core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R(K\x01K\x04\x85" + dtype + b"\x89"
    return b"\x80\x04}(U\x04data" + array + b"C\x20" + b"A" * 32 + b"tbU\x06labels](K\x00K\x01K\x02K\x03eu."


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pickle.dumps(_Evil()), "it refers to (posix|nt).system, which a CIFAR batch does not need"),
        (b"garbage", "is not a CIFAR batch"),
        (_pointers(), "is not a CIFAR batch: an array has elements of type .O8, which are not numbers"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [[0]]}), "expected an array or a list of numbers, found a list"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0], "filenames": [3]}), "no list filenames of 1 names"),
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


def test_batches_of_every_protocol_are_read_bit_for_bit(tmp_path: Path) -> None:
    folder = _cifar10(tmp_path / "c")
    before = open_source(folder)
    assert before.images is not None
    for protocol in range(6):
        for file in folder.iterdir():
            file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol))
        found = open_source(folder)
        assert found.images is not None
        np.testing.assert_array_equal(found.images, before.images)
        assert (names(found), found.labels.tolist(), found.fingerprint) == (names(before), before.labels.tolist(), before.fingerprint)


def test_class_names_of_cifar_that_are_none(tmp_path: Path) -> None:
    folder = _cifar10(tmp_path / "c")
    for content in ({}, {"label_names": 3}, {"label_names": []}):
        (folder / "batches.meta").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"batches.meta is not a CIFAR file: it has no list label_names"):
            open_source(folder)


def test_a_missing_cifar_batch(tmp_path: Path) -> None:
    folder = _cifar10(tmp_path / "c")
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4 is missing; unpack CIFAR's archive again"):
        open_source(folder)
