"""How a try to fetch fails."""

from __future__ import annotations

from dtl.data.remote.stream import FetchError


def test_what_is_missing_is_not_tried_again() -> None:
    assert FetchError("busy").retry
    assert not FetchError("refused", retry=False).retry
    missing = FetchError("404", retry=True, missing=True)
    assert missing.missing
    assert not missing.retry
