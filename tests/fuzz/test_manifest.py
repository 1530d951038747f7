"""Any manifest is a Manifest whose fields are right, or one line."""

from __future__ import annotations

import re
import resource
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_mutations import attempt, mutated_json

from dtl.data.shards.manifest import Manifest
from dtl.errors import UserError

PACKED: dict[str, Any] = {
    "version": 1,
    "classes": ["ant", "bee"],
    "display_names": {"ant": "Ameise"},
    "shards": [{"url": f"shard-{n}.tar", "samples": 3, "bytes": 4096, "sha256": f"{n:064x}"} for n in range(3)],
    "class_counts": [4, 5],
    "dataset_id": "0123456789abcdef" * 2,
    "index_sha256": "a" * 64,
    "made_by": {"dtl": "0.2.0", "source": "image folder", "options": {"seed": 0}},
}
INDEXED = {**PACKED, "made_by": {"keys_sha256": "b" * 64, "rules": {"image_field": None, "label_field": "cls"}, "label_numbers": "name"}}


def check(text: bytes) -> None:
    manifest, refusal = attempt(lambda: Manifest.parse(text, "manifest.json"))
    if manifest is None:
        assert refusal.startswith("manifest.json")
        return
    assert all(re.fullmatch(r"[0-9a-f]{64}", shard.sha256) for shard in manifest.shards)
    assert re.fullmatch(r"[0-9a-f]{8,64}", manifest.dataset_id)
    assert re.fullmatch(r"[0-9a-f]{64}", manifest.index_sha256)
    assert all(0 <= shard.samples < 2**63 and 0 <= shard.bytes < 2**63 for shard in manifest.shards)
    assert sum(manifest.class_counts) == manifest.num_samples
    assert len(set(manifest.classes)) == len(manifest.classes) == len(manifest.class_counts)
    assert not any(re.search(r"[\x00-\x1f\x7f]", shard.url) for shard in manifest.shards)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([PACKED, INDEXED]).flatmap(mutated_json))
def test_a_changed_manifest(text: bytes) -> None:
    check(text)


@pytest.mark.soak
@settings(max_examples=50_000, deadline=None)
@given(st.sampled_from([PACKED, INDEXED]).flatmap(mutated_json))
def test_many_changed_manifests(text: bytes) -> None:
    check(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"shards":[' + b"1," * 2_000_000 + b"1]}",
        b'{"display_names":{' + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}}",
        b'{"x":[' + b"[1]," * 1_000_000 + b"1]}",
        b'{"x":[' + b"1," * 9_000_000 + b"1]}",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
    ],
    ids=["wrong shards", "wrong names", "unknown lists", "too many", "deep lists", "deep objects"],
)
def test_what_is_wrong_a_million_times_takes_little_memory(text: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        Manifest.parse(text, "manifest.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
