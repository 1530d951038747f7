"""`dtl verify-epoch`: the table and bad options."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.commands import verify_epoch as command
from dtl.data.packing.pack import pack
from dtl.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 24, "bee": 23})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=30_000, processes=1, progress=False)
    return folder


def test_the_table(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run([str(packed), "--image-size", "8", "--workers", "0", "--pixels"]) == 0
    words = capsys.readouterr().out.split()
    for word in ("expected", "seen", "duplicated", "missing", "damaged", "batches", "pixels"):
        assert word in words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--world", "0"], "--world must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--world", "70"], "--global-batch-size 64 is smaller than --world 70"),
        (["--cache-gb", "0"], r"^cache_gb: .*must be above 0 \(got 0.0\)$"),
        (["--val-fraction", "1.5"], r"^val_fraction: .*must be below 1 \(got 1.5\)$"),
    ],
)
def test_bad_options(packed: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        command.run([str(packed), *options])
