"""Damaged archives of class folders: they are packed, or UserError, in bounded time and memory, and nothing is written beside the destination."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path

from mutations import bounded, fuzzed, mutated, one_line
from tiny_images import encoded

from dtl.data.packing.pack import pack
from dtl.errors import UserError

_IMAGES = {f"{split}/{name}/{number}.jpg": encoded(seed=number) for split in ("train", "val") for name in ("a", "b") for number in range(2)}


def _zip(method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in _IMAGES.items():
            archive.writestr(name, data)
    return out.getvalue()


def _tar(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in _IMAGES.items():
            member = tarfile.TarInfo(f"{'long' * 30}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


_TARS = [_tar(tarfile.PAX_FORMAT), _tar(tarfile.GNU_FORMAT), gzip.compress(_tar(tarfile.USTAR_FORMAT))]
_ARCHIVES = [_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED), *_TARS]


@fuzzed(mutated(_ARCHIVES), 120)
def test_damaged_archives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / ("a.zip" if data.startswith(b"PK") else "a.tar.gz")
        path.write_bytes(data)
        with bounded(megabytes=64):
            try:
                pack(path, Path(place) / "out", processes=1, progress=False)
            except UserError as error:
                one_line(error)
        assert {entry.name for entry in Path(place).iterdir()} <= {path.name, "out"}
