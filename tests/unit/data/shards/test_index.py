"""Manifest, index and reading by number: right bytes in any order, and all damage noticed, in its slot."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from harness import run, the_line
from tiny_images import image_folder

from dtl.data.packing.pack import pack
from dtl.data.shards import index
from dtl.data.shards.index import Manifest, Shards, check_class_maps
from dtl.errors import DamagedSample, UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 3 classes in several shards."""
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 50, "bee": 40, "cat": 30})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=60_000, processes=1, progress=False)
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def members(folder: Path) -> list[tuple[str, bytes, int]]:
    """(key, image, label) of all samples in packed order, as the standard library reads the tars."""
    found = []
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            by_key: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, extension = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                by_key.setdefault(key, {})[extension] = file.read()
        for key, parts in by_key.items():
            found.append((key, parts["jpg"], int(parts["cls"])))
    return found


def test_every_sample_is_what_the_tar_holds(packed: Path) -> None:
    shards, expected = Shards.open(packed), members(packed)
    assert len(shards.manifest.shards) > 2
    assert shards.num_samples == len(expected) == 120
    assert shards.read(np.arange(120)) == [image for _, image, _ in expected]
    assert shards.labels.tolist() == [label for _, _, label in expected]
    assert [shards.key(sample) for sample in range(120)] == [key for key, _, _ in expected]
    assert shards.shard_sizes.tolist() == [shard.samples for shard in shards.manifest.shards]
    assert (shards.classes, shards.num_classes) == (("ant", "bee", "cat"), 3)


def test_columns_have_their_types(packed: Path) -> None:
    shards = Shards.open(packed)
    kinds = {"labels": "i4", "widths": "u2", "heights": "u2", "flags": "u1", "offsets": "u8", "sizes": "u4", "crcs": "u4"}
    for name, kind in kinds.items():
        column = getattr(shards, name)
        assert column.dtype == np.dtype("<" + kind), name
        assert column.shape == (120,), name
    assert shards.widths.tolist() == [12] * 120
    assert set(shards.heights.tolist()) == {10, 11, 12, 13, 14}


@pytest.mark.parametrize("seed", range(5))
def test_any_order_with_repeats(packed: Path, seed: int) -> None:
    shards, expected = Shards.open(packed), [image for _, image, _ in members(packed)]
    samples = np.random.default_rng(seed).integers(0, 120, 70)
    assert shards.read(samples) == [expected[sample] for sample in samples]
    assert shards.read([]) == []
    with pytest.raises(IndexError):
        shards.read([120])
    with pytest.raises(IndexError):
        shards.read([-1])


def test_neighbours_are_read_together(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards.open(packed)
    calls = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: calls.append(arguments) or real(*arguments))
    shards.read(np.arange(120))
    assert len(calls) == len(shards.manifest.shards), "one read a shard, for shards this small"


def test_few_files_stay_open(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    shards = Shards.open(packed)
    for sample in range(0, 120, 7):
        assert isinstance(shards.read([sample])[0], bytes)
    assert len(os.listdir("/proc/self/fd")) <= before + 3, "two shards and the index"
    del shards
    assert len(os.listdir("/proc/self/fd")) == before


def test_pickle_is_small_and_reads_again(packed: Path) -> None:
    shards = Shards.open(packed)
    first = shards.read([3])
    data = pickle.dumps(shards)
    assert len(data) < 3000, "no column travels with it"
    again = pickle.loads(data)
    assert again.read([3]) == first
    assert again.dataset_id == shards.dataset_id


def test_a_forked_child_reads_with_its_own_files(packed: Path) -> None:
    shards = Shards.open(packed)
    expected = shards.read(np.arange(120))
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, b"same" if shards.read(np.arange(120)) == expected else b"other")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(into)
    assert os.read(out, 10) == b"same"
    os.close(out)
    assert shards.read(np.arange(120)) == expected


def test_threads_share_one_reader(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_OPEN_SHARDS", 1)
    shards, expected = Shards.open(packed), [image for _, image, _ in members(packed)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for samples in np.random.default_rng(seed).integers(0, 120, (20, 10)):
            if shards.read(samples) != [expected[sample] for sample in samples]:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def one_damaged(folder: Path, sample: int) -> DamagedSample:
    """Read everything; only `sample` may be damaged."""
    shards = Shards.open(folder)
    found = shards.read(np.arange(shards.num_samples))
    damaged = [number for number, one in enumerate(found) if isinstance(one, DamagedSample)]
    assert damaged == [sample]
    damage = found[sample]
    assert isinstance(damage, DamagedSample)
    assert damage.offset == int(shards.offsets[sample])
    assert damage.shard == shards.manifest.shards[shards.shard_of(sample)].url
    return damage


@pytest.mark.parametrize("how", ["one bit", "a zeroed block"])
def test_changed_bytes_are_damage(copy: Path, how: str) -> None:
    shards = Shards.open(copy)
    sample = 57
    path = copy / shards.manifest.shards[shards.shard_of(sample)].url
    data = bytearray(path.read_bytes())
    middle = int(shards.offsets[sample]) + int(shards.sizes[sample]) // 2
    if how == "one bit":
        data[middle] ^= 1
    else:
        data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    damage = one_damaged(copy, sample)
    assert "crc32" in damage.reason
    assert damage.key == f"{sample:06d}"


def test_a_damaged_header_leaves_the_image_readable_but_nameless(copy: Path) -> None:
    shards = Shards.open(copy)
    path = copy / shards.manifest.shards[0].url
    data = bytearray(path.read_bytes())
    data[int(shards.offsets[0]) - 512] ^= 1
    path.write_bytes(data)
    assert isinstance(shards.read([0])[0], bytes), "the header is not needed for reading"
    with pytest.raises(DamagedSample, match="header before the image is damaged"):
        shards.key(0)


def test_a_cut_shard_damages_only_what_lies_behind_the_cut(copy: Path) -> None:
    shards = Shards.open(copy)
    first = int(shards.shard_sizes[0])
    cut = int(shards.offsets[first - 3]) + 5
    os.truncate(copy / shards.manifest.shards[0].url, cut)
    found = shards.read(np.arange(shards.num_samples))
    damaged = [number for number, one in enumerate(found) if isinstance(one, DamagedSample)]
    assert damaged == [first - 3, first - 2, first - 1]
    assert all("the shard ends" in found[number].reason for number in damaged)  # type: ignore[union-attr]


def test_a_missing_shard_damages_its_samples(copy: Path) -> None:
    shards = Shards.open(copy)
    (copy / shards.manifest.shards[1].url).unlink()
    first, count = int(shards.shard_sizes[0]), int(shards.shard_sizes[1])
    found = shards.read(np.arange(shards.num_samples))
    assert [number for number, one in enumerate(found) if isinstance(one, DamagedSample)] == list(range(first, first + count))
    damage = found[first]
    assert isinstance(damage, DamagedSample)
    assert (damage.reason, damage.key, damage.shard) == ("the shard is missing", "", "shard-00001.tar")


def test_a_shard_replaced_by_another_is_damage(copy: Path) -> None:
    shards = Shards.open(copy)
    one, two = (copy / shards.manifest.shards[number].url for number in (0, 1))
    two.write_bytes(one.read_bytes())
    first, count = int(shards.shard_sizes[0]), int(shards.shard_sizes[1])
    found = shards.read(np.arange(first, first + count))
    assert all(isinstance(one, DamagedSample) for one in found)


def test_a_shard_that_shrinks_while_it_is_open(copy: Path) -> None:
    shards = Shards.open(copy)
    shards.read([0])
    os.truncate(copy / shards.manifest.shards[0].url, 0)
    found = shards.read([0])[0]
    assert isinstance(found, DamagedSample)


def test_counts_of_classes_that_are_not_those_of_the_index(copy: Path) -> None:
    """A manifest of other data, or edited by hand: the classes' weights, and what has no image, would be wrong without a word."""
    text = (copy / "manifest.json").read_text()
    counts = json.loads(text)["class_counts"]
    assert counts == [50, 40, 30]
    (copy / "manifest.json").write_text(json.dumps({**json.loads(text), "class_counts": [50, 30, 40]}))
    with pytest.raises(UserError, match=r"manifest.json and index.bin do not belong together, or one is damaged: according to the first there are 30 "):
        Shards.open(copy)
    with pytest.raises(UserError, match=r"samples of class 'bee', according to the second 40; pack the data again$"):
        Shards.open(copy)
    for split in ("train", "val"):
        shutil.copytree(copy, copy.parent / "both" / split)
    done = run(["--config", "finetune", "--data.train", "both"], cwd=copy.parent, code=2)
    assert "do not belong together" in the_line(done)


def test_original_paths(packed: Path) -> None:
    shards = Shards.open(packed)
    found = {shards.path(sample) for sample in range(120)}
    assert len(found) == 120
    assert "ant/0007.jpg" in found
    for sample in range(0, 120, 11):
        assert shards.path(sample).split("/")[0] == shards.classes[shards.labels[sample]]  # type: ignore[union-attr]
    (packed / "paths.bin").rename(packed / "away")
    try:
        assert Shards.open(packed).path(0) is None
    finally:
        (packed / "away").rename(packed / "paths.bin")


def test_class_maps(packed: Path) -> None:
    from dataclasses import replace

    train = Manifest.read(packed)
    check_class_maps(train, train)
    for classes, message in [
        (("ant", "bee", "dog"), "the validation data has class 'dog', which the training data does not have"),
        (("bee", "ant", "cat"), "different orders: label 0 is 'ant' in training and 'bee' in validation"),
        (("ant", "cat"), "was packed without class 'bee'"),
    ]:
        with pytest.raises(UserError, match=message):
            check_class_maps(train, replace(train, classes=classes))
