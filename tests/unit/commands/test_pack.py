"""`dtl pack`: its options, its output and its mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_folders import with_bad_images
from tiny_images import image_folder

from dtl.commands.pack import parse_size, run
from dtl.data.shards.index import Shards
from dtl.errors import UserError


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = with_bad_images(tmp_path / "s")
    assert run([str(root), str(tmp_path / "d"), "--on-error", "skip", "--val-fraction", "0.25", "--processes", "1"]) == 0
    captured = capsys.readouterr()
    assert "image folder, 45 images of 2 classes" in captured.err
    assert "5 images cannot be read and were left out: " in captured.err
    lines = captured.out.splitlines()
    assert lines[0] == f"train  30 images, 1 shard, {_mib(tmp_path / 'd' / 'train')}: {tmp_path / 'd' / 'train'}"
    assert lines[1].startswith("val    10 images")
    assert lines[2].endswith("5 images left out")


def _mib(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.tar')) / 2**20:.1f} MiB"


def test_command_packs_val_with_the_classes_of_train(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    image_folder(tmp_path / "val", {"c": 2}, seed=1)
    assert run([str(tmp_path / "train"), str(tmp_path / "d1" / "train"), "--quiet"]) == 0
    assert run([str(tmp_path / "val"), str(tmp_path / "d2"), "--quiet", "--classes-from", str(tmp_path / "d1")]) == 0
    assert Shards.open(tmp_path / "d2").labels.tolist() == [2, 2]
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        run([str(tmp_path / "val"), str(tmp_path / "d3"), "--classes-from", str(tmp_path / "train")])


def test_command_tells_and_leaves_out_hidden_files_and_empty_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3, "c": 0})
    (root / "a" / ".hidden.jpg").write_bytes(b"")
    assert run([str(root), str(tmp_path / "d")]) == 0
    told = capsys.readouterr().err
    assert "class folders without an image left out: 'c'" in told
    assert "1 hidden or system file left out ('a/.hidden.jpg')" in told
    assert Shards.open(tmp_path / "d").classes == ("a", "b")


def test_quiet_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["digits", str(tmp_path / "d"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "size"),
    [("128MB", 128_000_000), ("128MiB", 2**27), ("1.5 gib", 3 * 2**29), ("64k", 64_000), ("1000", 1000), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_that_are_refused() -> None:
    for text in ["", "big", "12 parsec", "-5MB", "i", "5i"]:
        with pytest.raises(UserError, match="not a size"):
            parse_size(text)
