"""Packed shards elsewhere are found and mirrored."""

from __future__ import annotations

from itertools import product

import pytest

from dtl.config.models import DataConfig
from dtl.data.shards import mirror
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.sources.splits import SERVES_AS

NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}


CASES = (str.lower, str.capitalize, str.upper)


GRID = [(case(train), case(other)) for kind in ("val", "test") for train, other, case in product(NAMES["train"], NAMES[kind], CASES)]


@pytest.mark.parametrize(("train", "other"), GRID)
def test_packed_shards_elsewhere(train: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {f"https://host/data/{name}/{MANIFEST_NAME}": name.encode() for name in (train, other)}
    monkeypatch.setattr(mirror, "fetch_bytes", lambda url, *, options: there.get(url))
    for split, name in (("train", train), ("val", other)):
        found = mirror.find_remote_folder("https://host/data", SERVES_AS[split], options=DataConfig())
        assert found == (f"https://host/data/{name}", name.encode())
