"""What a download is made of: one answer of a server, a command or a file system, and the ways in which it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 2**18


class FetchError(Exception):
    """One attempt failed. `retry`: another one may succeed; `restart`: only from the first byte; `after`: not before so many seconds.

    `missing`: the file does not exist there; `changed`: what came is another file than the manifest describes; `away`: the server did not answer.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry: bool = True,
        restart: bool = False,
        after: float | None = None,
        missing: bool = False,
        changed: bool = False,
        away: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry, self.restart, self.after = reason, retry and not missing, restart or changed, after
        self.missing, self.changed, self.away = missing, changed, away


class Unfetched(Exception):
    """All attempts failed; the message is one line with the address, the reason and the number of attempts. Otherwise as `FetchError`.

    `refused`: the server answered that it does not give this file (401, 403); no later attempt will change that.
    """

    def __init__(self, message: str, *, missing: bool = False, changed: bool = False, refused: bool = False, away: bool = False) -> None:
        super().__init__(message)
        self.missing, self.changed, self.refused, self.away = missing, changed, refused, away


@dataclass
class Stream:
    """The bytes of a file from `start` on. `blocks` raises FetchError where they break off; its plain end may still be too early."""

    start: int
    total: int | None
    """Bytes of the whole file, where that is known."""
    ends: int | None
    """The position after the last byte that the server announced, where that is known."""
    validator: str | None
    """Names this version of the file, where the other side does."""
    status: int | None
    blocks: Iterator[bytes]
    close: Callable[[], None]
