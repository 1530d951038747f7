"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Any], Any], *, sync: bool = True) -> None:
    """`write(file)` under a temporary name, then renamed; with `sync` on the disk before it has its name, so also after a power cut.

    What had the name before stays whole for those who have it open or mapped.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{temporary_suffix()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_suffix() -> str:
    """Names the node, so that its leftovers can be told from what another node is writing."""
    return f".{socket.gethostname()}.tmp"


def fsync_folder(folder: Path) -> None:
    """Put the folder's names on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
