"""All ranks must have been started with the same settings and versions: one that differs would hang the others in a collective, or train another network."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dtl.config import Config
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.version import __version__

# What nodes may have of their own: where their disks are, and how many processes read from them.
MAY_DIFFER = ("data.train", "data.val", "data.test", "data.cache_dir", "data.cache_shared", "data.workers")
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "simplejpeg", "safetensors")


def check_same_start(config: Config, name: str, runtime: Runtime) -> None:
    """Raises the same UserError on every rank where settings or versions differ; it names the first rank and the first difference."""
    mine = {"run": name, "the device": runtime.device.type, "the precision": runtime.precision, **_settings(config), **_versions()}
    digests = runtime.gather(hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone = runtime.gather((socket.gethostname(), mine))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    raise UserError(_difference(everyone, others))


def _difference(everyone: Sequence[tuple[str, Mapping[str, Any]]], others: list[int]) -> str:
    first_host, first = everyone[0]
    rank = others[0]
    host, facts = everyone[rank]
    keys = [key for key in dict.fromkeys([*first, *facts]) if first.get(key) != facts.get(key)]
    more = f" ({len(keys) - 1} more differences)" if len(keys) > 1 else ""
    also = f", and {len(others) - 1} more ranks differ" if len(others) > 1 else ""
    return (
        f"the ranks were not started with the same settings: {keys[0]} is {facts.get(keys[0])!r} on rank {rank} (host {host}), "
        f"{first.get(keys[0])!r} on rank 0 (host {first_host}){more}{also}; give all nodes the same command and the same environment"
    )


def _settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.flat().items() if not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"the version of dtl": __version__, "the version of python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[f"the version of {package}"] = version(package)
        except PackageNotFoundError:
            found[f"the version of {package}"] = None
    return found
