"""Errors that a user can cause. Each message is one line: what was wrong, where, what to do."""

from __future__ import annotations

# Exit statuses of every command.
EXIT_DONE, EXIT_FAULT, EXIT_WRONG_INPUT = 0, 1, 2
EXIT_STOPPED = 75  # by a signal or the deadline, after saving: run me again


class UserError(Exception):
    """A mistake that the user can fix. `dtl` prints its message once, without a traceback, and exits with status 2."""


class TransferRefused(UserError):
    """Pretrained weights that were not loaded, because loading them would have been wrong or doubtful."""


class DamagedSample(UserError):
    """One sample that cannot be used.

    `shard` is the tar's name, `key` the sample's WebDataset key (empty where it cannot be read),
    `offset` the first byte of the image in the shard, `reason` what was found.
    """

    def __init__(self, *, shard: str, key: str, offset: int, reason: str) -> None:
        self.shard, self.key, self.offset, self.reason = shard, key, offset, reason
        name = f"sample {key}" if key else "a sample"
        super().__init__(f"{shard}: {name} at byte {offset} is damaged: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from positional arguments when they cross a process; ours are keyword-only.
        return _rebuild_damaged, (self.shard, self.key, self.offset, self.reason)


def _rebuild_damaged(shard: str, key: str, offset: int, reason: str) -> DamagedSample:
    return DamagedSample(shard=shard, key=key, offset=offset, reason=reason)
