"""What of a run's settings goes into its model folder."""

from __future__ import annotations

from typing import Any

import pytest

from dtl.data.remote.address import redact


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("photos/train", "photos/train"),
        ("torchvision:IMAGENET1K_V2", "torchvision:IMAGENET1K_V2"),
        ("https://host/shards/{000..009}.tar", "https://host/shards/{000..009}.tar"),
        ("https://me:p@ss@host:8080/a.tar?token=abc#x", "https://host:8080/a.tar"),
        ("https://host/a.tar?X-Signature=abc https://me:secret@other/b.tar", "https://host/a.tar https://other/b.tar"),
        ("pipe:curl -H 'Authorization: abc' https://host/a.tar", "pipe:"),
        ({"train": ["s3://key@bucket/a", 3], "val": None, "lr": 0.1}, {"train": ["s3://bucket/a", 3], "val": None, "lr": 0.1}),
    ],
)
def test_addresses_lose_what_is_secret_and_nothing_else_changes(given: Any, kept: Any) -> None:
    assert redact(given) == kept
