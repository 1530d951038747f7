"""The Hugging Face hub, as timm uses it: names of its repositories, and a quick answer where there is no network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse

_PREFIXES = ("hf-hub:", "hf_hub:")
_SECONDS = 5.0


def hub_name(name: str) -> str | None:
    """`org/name[@revision]` of `[timm/]hf-hub:org/name[@revision]`; None if `name` names no repository."""
    bare = name.removeprefix("timm/").removeprefix("timm:")
    return next((bare.removeprefix(prefix) for prefix in _PREFIXES if bare.startswith(prefix)), None)


@contextmanager
def hub_in_reach() -> Iterator[None]:
    """Within it the hub's client uses only its cache if the hub does not answer: its own retries take a minute and print every attempt."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def why_not_fetched(what: str, error: BaseException) -> str:
    """One line: why a repository could not be fetched, and what to do."""
    from huggingface_hub import constants

    words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if isinstance(error, (RuntimeError, ValueError, TypeError, LookupError, AssertionError)):  # it is there, but is not what it should be
        return f"cannot use {what}: {words}"
    kinds = {kind.__name__ for kind in (*type(error).__mro__, *type(error.__cause__).__mro__)}
    if constants.HF_HUB_OFFLINE or kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        words = f"the hub cannot be reached, and the cache ({constants.HF_HUB_CACHE}) does not contain it"
    name, _, revision = what.partition("@")
    command = f"hf download {name} --revision {revision}" if revision else f"hf download {name}"
    return f"cannot download {what}: {words}; run `{command}` with network access, or give a file"


def _answers(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")):
        return True  # the proxy's matter
    address = urlparse(endpoint)
    try:
        with socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=_SECONDS):
            return True
    except OSError:
        return False
