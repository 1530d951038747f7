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

MANIFEST = Manifest(1, ("a", "b"), {}, (Shard("s-0.tar", 4, 100, "0"), Shard("s-1.tar", 3, 90, "1")), (4, 3), "id", "x", {})
QUARANTINE = Quarantine("id", "index-without.bin", "sha", (3, 2), (3, 2), (BadSample(1, "s-0.tar", "k1", 5, "cut"), BadSample(6, "s-1.tar", "k6", 7, "zero")))


def test_it_comes_back_as_written(tmp_path: Path) -> None:
    assert Quarantine.read(tmp_path, MANIFEST) is None
    QUARANTINE.write(tmp_path)
    assert Quarantine.read(tmp_path, MANIFEST) == QUARANTINE


def test_what_is_left_is_another_data_set() -> None:
    left = QUARANTINE.applied(MANIFEST)
    assert [shard.samples for shard in left.shards] == [3, 2]
    assert left.class_counts == (3, 2)
    assert [shard.sha256 for shard in left.shards] == ["0", "1"]
    fewer = replace(QUARANTINE, samples=QUARANTINE.samples[:1])
    assert len({MANIFEST.dataset_id, left.dataset_id, fewer.dataset_id()}) == 3


@pytest.mark.parametrize("left_out", [[], [0], [6], [0, 1, 2], [1, 6], [0, 3, 4]])
def test_numbers_of_the_samples_that_are_left(left_out: list[int]) -> None:
    left = [number for number in range(7) if number not in left_out]
    assert [original_number(sample, np.array(left_out, np.int64)) for sample in range(len(left))] == left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has format version 2, this dtl reads version 1"),
        ({"of": "another"}, "is about another data set"),
        ({"shard_samples": [5]}, "is about another data set"),
        ({"samples": [{"sample": 1}]}, "is damaged"),
        ({"class_counts": None}, "is damaged"),
    ],
)
def test_a_file_that_does_not_belong_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    QUARANTINE.write(tmp_path)
    place = tmp_path / QUARANTINE_NAME
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        Quarantine.read(tmp_path, MANIFEST)
    for text in ("[]", "{", "3"):
        place.write_text(text)
        with pytest.raises(UserError, match=r"is damaged|cannot be read"):
            Quarantine.read(tmp_path, MANIFEST)
