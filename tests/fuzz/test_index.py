"""Any index.bin and any table of names is used within its shards, or refused in one line; no read takes more memory than the shard has bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from json_mutations import attempt, mutated_bytes

from dtl.data.shards.index import INDEX_NAME, Manifest, Shard, Shards, write_index
from dtl.data.shards.strings import StringTable
from dtl.errors import DamagedSample

NUM = 6


def packed(folder: Path) -> bytes:
    """Two shards of three samples; returns index.bin."""
    shards = []
    for number in range(2):
        (folder / f"s-{number}.tar").write_bytes(bytes(4096))
        shards.append(Shard(url=f"s-{number}.tar", samples=3, bytes=4096, sha256="0" * 64))
    columns = {
        "offsets": np.array([512, 1024, 2048] * 2, "<u8"),
        "sizes": np.full(NUM, 100, "<u4"),
        "crcs": np.zeros(NUM, "<u4"),
        "labels": np.array([0, 1, 0, 1, 0, 1], "<i4"),
        "widths": np.full(NUM, 10, "<u2"),
        "heights": np.full(NUM, 10, "<u2"),
        "flags": np.ones(NUM, "u1"),
    }
    digest = write_index(folder / INDEX_NAME, np.array([3, 3]), columns)
    manifest = Manifest(
        version=1, classes=("a", "b"), display_names={}, shards=tuple(shards), class_counts=(3, 3), dataset_id="ab" * 16, index_sha256=digest, made_by={}
    )
    manifest.write(folder)
    return (folder / INDEX_NAME).read_bytes()


FOLDER = Path(tempfile.mkdtemp(prefix="dtl-fuzz-"))
INDEX = packed(FOLDER)


def check(data: bytes) -> None:
    (FOLDER / INDEX_NAME).write_bytes(data)
    manifest = Manifest.read(FOLDER)
    dataclasses.replace(manifest, index_sha256=hashlib.sha256(data).hexdigest()).write(FOLDER)  # who edits the one edits the other
    tracemalloc.start()
    shards, refusal = attempt(lambda: Shards.open(FOLDER))
    if shards is None:
        assert INDEX_NAME in refusal
    else:
        assert shards.num_samples == NUM
        for found in shards.read(np.arange(NUM)):
            assert isinstance(found, bytes | DamagedSample)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    manifest.write(FOLDER)
    assert {path.name for path in FOLDER.iterdir()} == {"s-0.tar", "s-1.tar", INDEX_NAME, "manifest.json"}


@settings(max_examples=100, deadline=None)
@given(mutated_bytes(INDEX))
def test_a_changed_index(data: bytes) -> None:
    check(data)


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None)
@given(mutated_bytes(INDEX))
def test_many_changed_indexes(data: bytes) -> None:
    check(data)


def test_a_sample_of_four_gigabytes_takes_no_memory() -> None:
    data = bytearray(INDEX)
    sizes = 32 + 8 * 2 + 8 * NUM
    data[sizes : sizes + 4] = (2**32 - 1).to_bytes(4, "little")
    check(bytes(data))


NAMES = ["a", "", "ä/ö.jpg", "line\nbreak"]
StringTable.build(NAMES).write(FOLDER.with_suffix(".names"))
TABLE = FOLDER.with_suffix(".names").read_bytes()


@settings(max_examples=200, deadline=None)
@given(mutated_bytes(TABLE))
def test_a_changed_table_of_names(data: bytes) -> None:
    place = FOLDER.with_suffix(".names")
    place.write_bytes(data)
    table, _ = attempt(lambda: StringTable.read(place))
    if table is not None:
        assert len(table) < 10_000
        assert all(len(table[number]) <= len(data) for number in range(len(table)))
        attempt(lambda: table.take(np.arange(len(table))))
