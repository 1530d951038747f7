"""The tasks of packing."""

from __future__ import annotations

import io
import tarfile

import pytest

from dtl.data.packing import tasks as pack_tasks


@pytest.mark.parametrize("sizes", [(700, 1), (512, 2), (0, 0), (1025, 600)])
def test_members_are_written_as_webdataset_writes_them(sizes: tuple[int, int]) -> None:
    import webdataset

    members = {"jpg": b"x" * sizes[0], "cls": b"3" * sizes[1]}
    theirs, ours = io.BytesIO(), io.BytesIO()
    with webdataset.TarWriter(theirs, mtime=0, encoder=False) as tar:
        tar.write({"__key__": "000001", **members})
    with tarfile.open(fileobj=ours, mode="w|", format=tarfile.USTAR_FORMAT) as mine:
        pack_tasks.add_sample(mine, "000001", members)
    assert ours.getvalue() == theirs.getvalue()
