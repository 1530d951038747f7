"""Names of what is remote."""

from __future__ import annotations

from pathlib import Path

from dtl.data.remote.address import base_name, is_remote, join, shown, without_query


def test_names() -> None:
    assert all(is_remote(name) for name in ("http://x/y", "s3://x/y", "pipe:cat x", "S3://x"))
    assert not any(is_remote(name) for name in ("/a/b", "C:/x", Path("http://x")))
    assert join("http://x/y/?sig=1", "m.json") == "http://x/y/m.json?sig=1"
    assert join("s3://b/y/", "m.json") == "s3://b/y/m.json"
    assert base_name("https://x/y/t-01.tar?sig=a/b") == "t-01.tar"
    assert base_name("pipe:aws s3 cp s3://b/t-01.tar -") == "t-01.tar"
    assert without_query("https://u:p@x:8/y?z#w") == "https://x:8/y"
    assert shown("https://u:p@x/y?z") == "https://x/y?..."
