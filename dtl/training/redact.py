"""Settings as they may leave with a model: without what addresses carry for their owner's eyes only."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"://[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


def without_secrets(value: Any) -> Any:
    """The same plain values; URLs without user, password, query and fragment (tokens live there), `pipe:` without its command."""
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return "pipe:" if value.startswith("pipe:") else _QUERY.sub(r"\1", _USER.sub("://", value))
