"""Pipes, sockets, devices, links to themselves and to nothing, where images, shards, lists and weights are expected: one line, and no waiting."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.checkpoint.transfer.match.by_map import read_rules
from dtl.checkpoint.transfer.source.class_names import read_class_names
from dtl.checkpoint.transfer.source.convert import convert
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.cli import main
from dtl.config.models import DataConfig
from dtl.data.decoding.decode import DecodeError
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.data.sources.open import open_source
from dtl.data.verify import verify
from dtl.data.wds.find import find_shards
from dtl.data.wds.index import index_shards
from dtl.data.wds.labels import read_classes
from dtl.errors import UserError
from dtl.files import hash_file
from dtl.inference.images import find_images
from dtl.optim.losses import _weights_of_file
from dtl.reading import Reading

UNUSUAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: _bound(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: path.symlink_to("nothing-there"),
    "sparse": lambda path: _sparse(path),
}
REASON = {
    "pipe": "it is a named pipe", "socket": "it is a socket", "device": "it is a device", "itself": "Too many levels of symbolic links",
    "nothing": "No such file", "sparse": "it has 4,398,046,511,104 bytes, more than the",
}  # fmt: skip


def _bound(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has 107 characters at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)


@pytest.fixture(params=UNUSUAL)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_among_images(kind: str, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", {"a": 3, "b": 3})
    odd = photos / "a" / "odd.png"
    UNUSUAL[kind](odd)
    with pytest.raises(UserError, match=rf"1 of 7 images cannot be read: a/odd.png: {REASON[kind]}.*--on-error skip"):
        pack(photos, tmp_path / "refused", progress=False)
    report = pack(photos, tmp_path / "packed", on_error="skip", progress=False)
    assert [path for path, _ in report.skipped] == ["a/odd.png"]
    assert sum(split.num_samples for split in report.splits) == 6
    found = find_images([str(photos)])
    problems = []
    for number in range(len(found)):
        try:
            found.pixels(number, Reading())
        except DecodeError as error:
            problems.append(f"{found.name(number)}: {error}")
    assert len(problems) == 1
    assert problems[0].startswith(f"{odd}: {REASON[kind]}")


def test_as_a_shard(kind: str, tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "photos", {"a": 3, "b": 3}), tmp_path / "packed", progress=False)
    shard = tmp_path / "packed" / "shard-00000.tar"
    shutil.copytree(tmp_path / "packed", tmp_path / "copy")
    shard.unlink()
    UNUSUAL[kind](shard)
    if kind == "sparse":  # read from start to end, a sparse file of 4 TB would take an hour: only its beginning is looked at here
        os.truncate(shard, 1 << 20)
    shards = Shards.open(tmp_path / "packed")
    assert all(isinstance(one, UserError) for one in shards.read([0, 1, 2]))
    report = verify(tmp_path / "packed", progress=False, processes=1)
    assert not report.is_usable
    if kind in ("itself", "nothing"):  # a link that leads nowhere, as to a disk that is not mounted: nothing is known about its samples
        assert sum(number for _, number, _ in report.unread) == 6
    else:
        assert len(report.samples) == 6
    tar = tmp_path / "copy" / "odd.tar"
    UNUSUAL[kind](tar)
    if kind == "sparse":
        os.truncate(tar, 1 << 20)
    with pytest.raises(UserError):
        index_shards([str(tar)], out=tmp_path / "out", progress=False)


READERS: dict[str, Callable[[Path], object]] = {
    "list.txt": open_source,
    "list.csv": lambda path: find_images([str(path)]),
    "shards.txt": lambda path: find_shards([path]),
    "classes.txt": read_classes,
    "names.txt": lambda path: read_class_names(path, "--classes"),
    "classes.json": lambda path: read_class_names(path, "--classes"),
    "map.yaml": read_rules,
    "map.json": read_rules,
    "weights.json": lambda path: _weights_of_file(path, ["a"]),
    "w.pth": read_weights,
    "w.safetensors": read_weights,
    "w.pkl": lambda path: convert(str(path), path.with_name("out.safetensors")),
    "cifar-10-batches-py": lambda path: open_source(path),
}


# A file of zeros is no list of shards: it is taken for a tar (test_as_a_shard).
CASES = [(kind, name) for kind in UNUSUAL for name in READERS if (kind, name) != ("sparse", "shards.txt")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_where_a_file_is_read_whole(kind: str, name: str, tmp_path: Path) -> None:
    """Some are read in pieces, or only at their beginning: these have no limit of bytes, and a short file of zeros stands for the sparse one."""
    UNUSUAL[kind](tmp_path / name)
    if kind == "sparse" and name in ("w.safetensors", "w.pth", "w.pkl"):
        os.truncate(tmp_path / name, 1 << 20)
    with pytest.raises(UserError):
        READERS[name](tmp_path / name)
    assert not (tmp_path / "out.safetensors").exists()


def test_of_an_odd_file_no_hash_is_made(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is a named pipe"):
        hash_file(tmp_path / "pipe")


def test_the_key_and_the_options_set_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder(tmp_path / "photos", {"a": 3, "b": 3})
    largest = max(path.stat().st_size for path in photos.rglob("*.*"))
    assert main(["pack", str(photos), str(tmp_path / "p1"), "--quiet", "--max-file-bytes", str(largest - 1)]) == 2
    assert f"more than the {largest - 1:,} that are allowed for such a file" in capsys.readouterr().err
    assert main(["pack", str(photos), str(tmp_path / "p2"), "--quiet", "--max-pixels", "10"]) == 2
    assert "more than the 10 that are allowed (data.max_pixels)" in capsys.readouterr().err
    assert main(["pack", str(photos), str(tmp_path / "p3"), "--quiet", "--max-file-bytes", str(largest)]) == 0
    for options, reason in ((DataConfig(max_pixels=10), None), (DataConfig(max_file_bytes=10), "more than the 10 that are allowed .data.max_file_bytes")):
        shards = Shards.open(tmp_path / "p3", options)
        (found,) = shards.read([0])
        if reason is not None:
            assert isinstance(found, UserError)
            assert "more than the 10 that are allowed (data.max_file_bytes)" in str(found)
        report = verify(tmp_path / "p3", options, progress=False, processes=1)
        assert len(report.samples) == 6
    assert main(["verify", str(tmp_path / "p3"), "--quiet", "--max-pixels", "10"]) == 2
    assert main(["verify", str(tmp_path / "p3"), "--quiet"]) == 0
