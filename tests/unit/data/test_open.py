"""An image folder given to training is packed once, whoever comes first, and never twice at a time."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_images import encoded, image_folder

from dtl.config.models import DataConfig
from dtl.data.open import default_cache_dir, ensure_packed
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", {"a": 12, "b": 8})


def packed_into(tmp_path: Path, source: Path | str, said: list[str] | None = None, **options: Any) -> Path:
    say = said.append if said is not None else (lambda line: None)
    data = {key: str(value) if isinstance(value := options.pop(key), Path) else value for key in list(options) if key in DataConfig.model_fields}
    options = {"split": "train", "processes": 1, "progress": False, "log": say, **options}
    return ensure_packed(source, DataConfig(**{"cache_dir": str(tmp_path / "cache"), **data}), **options)


def test_packed_once_and_told(tmp_path: Path, photos: Path) -> None:
    said: list[str] = []
    folder = packed_into(tmp_path, photos, said)
    assert folder.parent == tmp_path / "cache"
    assert said[0] == f"packing {photos} (20 images of 2 classes) into {folder}"
    assert said[-1].endswith("it is used again as long as the source does not change")
    again: list[str] = []
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert packed_into(tmp_path, photos, again) == folder
    assert again == []
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_a_change_of_source_or_options_packs_anew(tmp_path: Path, photos: Path) -> None:
    seen = [packed_into(tmp_path, photos), packed_into(tmp_path, photos, on_error="skip"), packed_into(tmp_path, photos, val_fraction=0.25)]
    (photos / "a" / "new.jpg").write_bytes(encoded(seed=5))
    seen.append(packed_into(tmp_path, photos))
    assert len(set(seen)) == 4
    assert Shards.open(seen[-1]).num_samples == 21
    moved = photos.rename(tmp_path / "moved")
    assert packed_into(tmp_path, moved) == seen[-1], "the place does not matter"


def test_both_splits_of_one_source(tmp_path: Path, photos: Path) -> None:
    train, val = (packed_into(tmp_path, photos, split=split, val_fraction=0.25) for split in ("train", "val"))
    assert train.parent == val.parent
    assert (Shards.open(train).num_samples, Shards.open(val).num_samples) == (15, 5)
    train, val = (packed_into(tmp_path, "digits", split=split) for split in ("train", "val"))
    assert (Shards.open(train).num_samples, Shards.open(val).num_samples) == (1437, 360), "digits come with their splits"


def test_a_fraction_of_what_has_splits_is_not_ignored(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match=r"digits already has the splits train, val: leave out data.val_fraction"):
        packed_into(tmp_path, "digits", val_fraction=0.1)
    pack(photos, tmp_path / "d", val_fraction=0.25, progress=False)
    said: list[str] = []
    packed_into(tmp_path, tmp_path / "d", said, val_fraction=0.5)
    assert said == [f"{tmp_path / 'd'} is already packed, so data.val_fraction is ignored"]


def test_validation_takes_the_classes_of_training(tmp_path: Path, photos: Path) -> None:
    val = image_folder(tmp_path / "val", {"b": 2}, seed=1)
    classes = Shards.open(packed_into(tmp_path, photos)).classes
    folder = packed_into(tmp_path, val, split="val", classes=classes)
    assert Shards.open(folder).classes == ("a", "b")
    assert Shards.open(folder).labels.tolist() == [1, 1]
    image_folder(val, {"wasp": 1})
    with pytest.raises(UserError, match="1 class that the given class list does not have: 'wasp'"):
        packed_into(tmp_path, val, split="val", classes=classes)


def test_packed_shards_are_used_as_they_are(tmp_path: Path, photos: Path) -> None:
    pack(photos, tmp_path / "d", val_fraction=0.25, progress=False)
    for split in ("train", "val"):
        assert packed_into(tmp_path, tmp_path / "d", split=split) == tmp_path / "d" / split
        assert packed_into(tmp_path, tmp_path / "d" / split, split="train") == tmp_path / "d" / split
    assert not (tmp_path / "cache").exists()
    (tmp_path / "d" / "val").rename(tmp_path / "d" / "valid")
    assert packed_into(tmp_path, tmp_path / "d", split="val") == tmp_path / "d" / "valid"
    with pytest.raises(UserError, match=r"holds packed shards of train, valid, but none of test"):
        packed_into(tmp_path, tmp_path / "d", split="test")


def test_a_split_that_is_lacking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"digits has no split 'test'; it has train, val"):
        packed_into(tmp_path, "digits", split="test")


def test_the_rows_that_a_list_keeps_for_testing_are_not_trained_on(tmp_path: Path, photos: Path) -> None:
    """Column `split` decides what is trained on; without rows for validation those for testing serve, as folders do."""

    def listed(name: str, *splits: str) -> Path:
        rows = [f"{label}/{number:04d}.jpg,{label},{split}" for number, split in enumerate(splits) for label in ("a", "b")]
        (photos / name).write_text("\n".join(["path,label,split", *rows]))
        return photos / name

    def paths(folder: Path) -> set[str | None]:
        shards = Shards.open(folder)
        return {shards.path(sample) for sample in range(shards.num_samples)}

    both = listed("both.csv", "train", "train", "test", "Training")
    said: list[str] = []
    train = packed_into(tmp_path, both, said)
    assert paths(train) == {f"{label}/{number:04d}.jpg" for number in (0, 1, 3) for label in "ab"}
    assert said[1] == "  column 'split': 6 train, 2 test"
    assert paths(packed_into(tmp_path, both, split="val")) == {"a/0002.jpg", "b/0002.jpg"} == paths(packed_into(tmp_path, both, split="test"))
    three = listed("three.csv", "train", "test", "valid")
    assert paths(packed_into(tmp_path, three, split="val")) == {"a/0002.jpg", "b/0002.jpg"}
    with pytest.raises(UserError, match=r"both.csv already has the splits train, test: leave out data.val_fraction"):
        packed_into(tmp_path, both, val_fraction=0.5)
    with pytest.raises(UserError, match=r"test.csv has no split 'train'; it has test"):
        packed_into(tmp_path, listed("test.csv", "test"))
    assert Shards.open(packed_into(tmp_path, photos / "test.csv", split="val", classes=("a", "b"))).num_samples == 2
    one = listed("train.csv", *["train"] * 4)
    with pytest.raises(UserError, match=r"train.csv has no split 'val'; it has train"):
        packed_into(tmp_path, one, split="val")
    sizes = [Shards.open(packed_into(tmp_path, one, split=split, val_fraction=0.25)).num_samples for split in ("train", "val")]
    assert sizes == [6, 2], "rows that are all for training may be divided"


def test_left_out_images_are_told(tmp_path: Path, photos: Path) -> None:
    (photos / "a" / "bad.jpg").write_bytes(b"")
    (photos / ".hidden").write_text("x")
    with pytest.raises(UserError, match=r"1 of 21 images cannot be read: a/bad.jpg: the file is empty"):
        packed_into(tmp_path, photos)
    said: list[str] = []
    packed_into(tmp_path, photos, said, on_error="skip")
    assert any("1 hidden or system file left out ('.hidden')" in line for line in said)
    assert any("1 image cannot be read and was left out: a/bad.jpg: the file is empty (0 bytes)" in line for line in said)


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x"
    monkeypatch.delenv("DTL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "dtl"


def test_a_cache_that_cannot_be_made(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"the cache .*file/cache cannot be created: Not a directory; choose another one"):
        packed_into(tmp_path, photos, cache_dir=tmp_path / "file" / "cache")


_ENSURE = """
import sys, time
from pathlib import Path
from dtl.data import open as cache
from dtl.errors import UserError
slow = float(sys.argv[3])
print("begins", flush=True)
real = cache.pack_source
def pack(*arguments, **options):
    print("packing", flush=True)
    time.sleep(slow)
    return real(*arguments, **options)
cache.pack_source = pack
quiet = {"processes": 1, "progress": False, "log": lambda line: None}
print(cache.ensure_packed(sys.argv[1], cache.DataConfig(cache_dir=sys.argv[2]), split="train", **quiet), flush=True)
"""


def _start(photos: Path, cache: Path, slow: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _ENSURE, str(photos), str(cache), str(slow)], stdout=subprocess.PIPE, text=True)


def test_several_processes_at_once_pack_once(tmp_path: Path, photos: Path) -> None:
    started = [_start(photos, tmp_path / "cache", 0.3) for _ in range(4)]
    lines = [process.communicate(timeout=60)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert sum("packing" in of_one for of_one in lines) == 1
    assert len({of_one[-1] for of_one in lines}) == 1
    assert Shards.open(lines[0][-1]).num_samples == 20


def test_a_killed_packer_blocks_nobody(tmp_path: Path, photos: Path) -> None:
    first = _start(photos, tmp_path / "cache", 60)
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["begins\n", "packing\n"]
    second = _start(photos, tmp_path / "cache", 0)
    assert second.stdout is not None
    assert second.stdout.readline() == "begins\n"
    assert not select.select([second.stdout], [], [], 1.0)[0], "it waits for the first, and neither packs, nor ends"
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    out = second.communicate(timeout=60)[0].splitlines()
    assert out[0] == "packing"
    assert Shards.open(out[1]).num_samples == 20


def test_two_nodes_without_common_locks_do_no_harm(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node packs the same into the same cache, at the worst moments: before, during and after ours."""
    import socket

    from dtl.data.packing import tasks as pack_tasks

    real, nodes = pack_tasks.write_shard, []
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    options = {"split": "train", "processes": 1, "progress": False, "log": lambda line: None}

    def other_node_packs_all(job: Any, split: str, number: int) -> int:
        if not nodes:
            nodes.append("other")
            monkeypatch.setattr(socket, "gethostname", lambda: "other")
            monkeypatch.setattr("dtl.files.fcntl.flock", lambda *arguments: None)
            ensure_packed(photos, data, **options)
            monkeypatch.setattr(socket, "gethostname", lambda: "this")
        return real(job, split, number)

    monkeypatch.setattr(socket, "gethostname", lambda: "this")
    monkeypatch.setattr(pack_tasks, "write_shard", other_node_packs_all)
    folder = ensure_packed(photos, data, **options)
    assert nodes == ["other"]
    shards = Shards.open(folder)
    assert all(isinstance(one, bytes) for one in shards.read(np.arange(20)))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_cache_without_locks_is_used_with_one_line(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: int
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("dtl.files.fcntl.flock", refuse)
    lines: list[str] = []
    folder = ensure_packed(photos, DataConfig(cache_dir=str(tmp_path / "cache")), split="train", progress=False, log=lines.append)
    assert [line for line in lines if "without locks" in line] == [
        f"the cache {tmp_path}/cache is on a file system without locks: another process that packs {photos} may do the same work again"
    ]
    assert "without locks" not in capsys.readouterr().err
    assert Shards.open(folder).num_samples == 20
