"""Made weights lie under the published names of a hub's files, whose hashes they cannot have: their check is left out where they stand for real ones.

The check itself is tested in tests/unit/checkpoint/transfer/source/test_hubs.py.
"""

from __future__ import annotations


def believe() -> None:
    from dtl.checkpoint.transfer.source import read

    read.check_promised_hash = lambda path, sha256: None
