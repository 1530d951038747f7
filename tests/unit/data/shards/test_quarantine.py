"""quarantine.json: what is left out, and files that do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtl.data.shards.manifest import Manifest, Shard
from dtl.data.shards.quarantine import QUARANTINE_NAME, BadSample, Quarantine, original_number
from dtl.errors import UserError

MANIFEST = Manifest(
    version=1,
    classes=("a", "b"),
    display_names={},
    shards=(Shard(url="s-0.tar", samples=4, bytes=100, sha256="0" * 64), Shard(url="s-1.tar", samples=3, bytes=90, sha256="1" * 64)),
    class_counts=(4, 3),
    dataset_id="1d" * 16,
    index_sha256="a" * 64,
    made_by={},
)
INCREASING = r"is damaged: its sample numbers must be increasing and below \d+"
QUARANTINE = Quarantine(
    of="1d" * 16,
    index="index-without.bin",
    index_sha256="b" * 64,
    shard_samples=(3, 2),
    class_counts=(3, 2),
    samples=(
        BadSample(sample=1, shard="s-0.tar", key="k1", offset=5, reason="cut"),
        BadSample(sample=6, shard="s-1.tar", key="k6", offset=7, reason="zero"),
    ),
)


def test_it_comes_back_as_written(tmp_path: Path) -> None:
    assert Quarantine.of_folder(tmp_path, MANIFEST) is None
    QUARANTINE.write(tmp_path)
    assert Quarantine.of_folder(tmp_path, MANIFEST) == QUARANTINE


def test_what_is_left_is_another_data_set() -> None:
    left = QUARANTINE.applied(MANIFEST)
    assert [shard.samples for shard in left.shards] == [3, 2]
    assert left.class_counts == (3, 2)
    assert [shard.sha256 for shard in left.shards] == ["0" * 64, "1" * 64]
    fewer = replace(QUARANTINE, samples=QUARANTINE.samples[:1])
    assert len({MANIFEST.dataset_id, left.dataset_id, fewer.dataset_id()}) == 3


@pytest.mark.parametrize("left_out", [[], [0], [6], [0, 1, 2], [1, 6], [0, 3, 4]])
def test_numbers_of_the_samples_that_are_left(left_out: list[int]) -> None:
    left = [number for number in range(7) if number not in left_out]
    assert [original_number(sample, np.array(left_out, np.int64)) for sample in range(len(left))] == left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: format version 2, but this dtl reads version 1"),
        ({"of": "2d" * 16}, "belongs to another data set"),
        ({"of": "../x"}, "of: '../x' is not a hexadecimal number"),
        ({"index": "../../index.bin"}, "index: .* must be a file name without a folder"),
        ({"shard_samples": [5]}, "belongs to another data set"),
        ({"shard_samples": [5, 0]}, "is damaged: a shard has more samples"),
        ({"shard_samples": [3, -2]}, "shard_samples.1: -2 is not an integer from 0"),
        ({"samples": [{"sample": 1}]}, "samples.0.shard is missing"),
        ({"samples": []}, "is damaged: 0 samples left out and 5 kept do not agree with manifest .7"),
        ({"samples": [{"sample": n, "shard": "s", "key": "k", "offset": 1, "reason": "r"} for n in (6, 1)]}, INCREASING),
        ({"samples": [{"sample": n, "shard": "s", "key": "k", "offset": 1, "reason": "r"} for n in (1, 9)]}, INCREASING),
        ({"class_counts": None}, "class_counts: must be a list"),
    ],
)
def test_a_file_that_does_not_belong_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    QUARANTINE.write(tmp_path)
    place = tmp_path / QUARANTINE_NAME
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        Quarantine.of_folder(tmp_path, MANIFEST)
    for text in ("[]", "{", "3"):
        place.write_text(text)
        with pytest.raises(UserError, match=r"must be an object|not valid JSON"):
            Quarantine.of_folder(tmp_path, MANIFEST)
