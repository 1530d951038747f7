"""Damaged tars of others: samples, DamagedTar or UserError, and nothing is written anywhere."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from mutations import bounded, fuzzed, mutated, one_line
from PIL import Image

from dtl.data.decoding.headers import Limits
from dtl.data.wds.samples import Ignored, Rules, open_tar, read_samples
from dtl.data.wds.tar import DamagedTar, TarFile
from dtl.errors import UserError


def _tar(form: int, label: str = "cls") -> bytes:
    picture, out = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(3):
            for ending, data in (("png", picture.getvalue()), (label, b'{"label": 3}' if label == "json" else b"3")):
                member = tarfile.TarInfo(f"{'long' * 20 if number else 'a'}/{number:03}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


_TARS = [_tar(tarfile.USTAR_FORMAT), _tar(tarfile.PAX_FORMAT), _tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT, "json")]


@fuzzed(mutated(_TARS), 120)
def test_damaged_tars(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.tar"
        path.write_bytes(data)
        for rules in (Rules(), Rules(None, "label"), Rules("png", "folder")):
            with bounded(megabytes=64):
                try:
                    with open_tar(path) as file:
                        for sample in read_samples(TarFile(file), rules, Ignored(), Limits(1 << 20, 1 << 20)):
                            assert sample.problem or sample.header is not None
                except (DamagedTar, UserError) as error:
                    one_line(error)
        assert [entry.name for entry in Path(place).iterdir()] == ["a.tar"]
