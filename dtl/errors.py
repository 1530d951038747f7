"""Errors that a user can cause. Each message is one line: what was wrong, where, what to do."""

from __future__ import annotations

import re

from dtl.credentials import redacted_line

# Exit statuses of every command.
EXIT_DONE, EXIT_FAULT, EXIT_WRONG_INPUT = 0, 1, 2
EXIT_STOPPED = 75  # by a signal or the deadline, after saving: run me again


# Control characters, line and paragraph separators, what changes the direction of the text after it, and lone surrogates
# (file names that are not UTF-8), which most encodings refuse.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that somebody else may have chosen (a file's name, a class, a server's answer) as a piece of one line.

    What would begin a new line, move the cursor, change colours or turn the direction of writing stands there as `\\n`, `\\x1b`, `\\u202e`.
    Applied where text is printed, so that no caller has to think of it; a second time it changes nothing.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_MOST_CHARACTERS = 2000


def _bounded(line: str) -> str:
    """A line that repeats what a file holds, such as a key of a million characters, has its beginning and its end."""
    half = _MOST_CHARACTERS // 2
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


class UserError(Exception):
    """A mistake that the user can fix. `dtl` prints its message once, without a traceback, and exits with status 2."""

    def __init__(self, *lines: str) -> None:
        """One line; more of them only where a table follows. Each is printable, and names addresses without their passwords."""
        super().__init__(*(_bounded(printable(redacted_line(line))) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class Diverged(UserError):
    """A training loss that is not finite."""

    stop_requested = False
    """A signal had come before: nothing is to be started after this run."""


class Occupied(UserError):
    """A run folder that another process works in."""


class TransferRefused(UserError):
    """Pretrained weights that were not loaded, because loading them would have been wrong or doubtful."""


class DamagedSample(UserError):
    """One sample that cannot be used.

    `shard` is the tar's name, `key` the sample's WebDataset key (empty where it cannot be read),
    `offset` the first byte of the image in the shard, `reason` what was found.
    """

    _what, _advice = "is damaged", ""

    def __init__(self, *, shard: str, key: str, offset: int, reason: str) -> None:
        self.shard, self.key, self.offset, self.reason = shard, key, offset, reason
        name = f"sample {key}" if key else "a sample"
        super().__init__(f"{shard}: {name} at byte {offset} {self._what}: {reason}{self._advice}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from positional arguments when they cross a process; ours are keyword-only.
        return _rebuild_sample, (type(self), self.shard, self.key, self.offset, self.reason)


class UnreachableSample(DamagedSample):
    """One whose bytes cannot be had now, for a reason that is not theirs: a server, a network, a full disk, a permission.

    Nothing is known about the sample, so it is never skipped and never set aside.
    """

    _what, _advice = "cannot be read now", "; start the same command again when it can be read"


def _rebuild_sample(kind: type[DamagedSample], shard: str, key: str, offset: int, reason: str) -> DamagedSample:
    return kind(shard=shard, key=key, offset=offset, reason=reason)
