"""Which configs and models are the user's own, and which somebody else may have written: config.yaml of a run, and functions that a model.json names.

The user's own are this command line, the file given to `--config`, and the arguments of a Python call. A run's config.yaml and model.json are not, unless
this user's run wrote them. That is recorded outside of all runs and data, in one file of the user's:

    ~/.config/dtl/trusted.jsonl ($XDG_CONFIG_HOME/dtl/trusted.jsonl)
    {"made": SHA256, "path": PATH}                              this user's run wrote a config.yaml or model.json that is trusted only for this reason
    {"function": "package.module:function", "sha256": SHA256}   --trust was given: the function may be called for the model.json of this hash

Files are identified by their content: a run that is moved remains the user's own, one that is changed does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtl.config.load import check_phase_names, config_from_dict, parse_config
from dtl.config.models import Config, DataConfig, sides
from dtl.errors import UserError
from dtl.files import expand_home, flock
from dtl.text import Log
from dtl.untrusted import parse_json, read_regular

MAX_CONFIG_BYTES = 1 << 20
_MAX_FILE_BYTES = 64 << 20
_MAX_WORKERS = 8
MAX_IMAGE_SIZE = 4096
"""Pixels of a side, in a config that is not the user's own."""
_noted: set[tuple[str, str]] = set()
"""What this process has recorded: it counts here even if the file cannot be written."""


def own_file() -> Path:
    """The file that records what this user trusts. UserError for a user without a home (no $HOME, and no entry in /etc/passwd)."""
    return expand_home(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "dtl" / "trusted.jsonl"


def is_function(name: str) -> bool:
    """Whether a network's name is `package.module:function` (or an address), and not a name that dtl knows."""
    return ":" in name


# ---- the config of a run


@dataclass(frozen=True)
class StoredConfig:
    """A run's config.yaml. Unless the run is the user's `own`, `config` has no commands, no addresses and no places to write to."""

    config: Config
    text: str
    own: bool
    origin: str
    withheld: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> value of what was taken out of `config`: commands and addresses."""

    def require(self, *keys: str) -> None:
        """UserError where one of these settings was taken out."""
        for key in keys:
            if key in self.withheld:
                raise UserError(
                    f"{self.origin} was not written by a run of yours, so {key} in it ({self.withheld[key]!r}) is not used: dtl runs no commands and opens no "
                    "addresses from such a file; give the data with --data.val SRC"
                )


def stored_config(run: Path) -> StoredConfig:
    """The config that a run was started with. UserError where it cannot be read."""
    path = run / "config.yaml"
    try:
        data = read_regular(path, max_bytes=MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_stored(data, str(path), own=is_own(hashlib.sha256(data).hexdigest()))


def parse_stored(data: bytes, origin: str, *, own: bool) -> StoredConfig:
    """`stored_config` of text in YAML that was read at `origin`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8: {error.reason} at byte {error.start}") from None
    config = config_from_dict(parse_config(text, origin), origin)
    check_phase_names(config, origin)  # reports make file names of them
    if own:
        return StoredConfig(config, text, own, origin)
    if _longest_side(config) > MAX_IMAGE_SIZE:
        raise UserError(f"{origin}: data.image_size {_longest_side(config):,} is larger than {MAX_IMAGE_SIZE:,}, the limit for a config that is not yours")
    safe, withheld = _harmless(config)
    return StoredConfig(safe, text, own, origin, withheld)


def needs_record(config: Config) -> bool:
    """Whether a config contains something that is used only in the user's own: a run with it is recorded."""
    return is_function(config.model.name) or _longest_side(config) > MAX_IMAGE_SIZE or _harmless(config)[0] != config


def _longest_side(config: Config) -> int:
    size = config.data.image_size
    return 0 if size == "auto" else max(sides(size))


def _harmless(config: Config) -> tuple[Config, dict[str, str]]:
    """The config without commands, addresses, permission to run commands and a place to write to, and with limits for processes and image sizes.

    The section `transfer` stays as it is, for reports: no command loads weights by a stored config. A function in `model.name` is refused where it is built.
    """
    data = config.data
    withheld = {
        f"data.{name}": value for name in ("train", "val", "test", "names") if (value := getattr(data, name)) and (value.startswith("pipe:") or "://" in value)
    }
    changes: dict[str, Any] = {name.partition(".")[2]: None for name in withheld}
    if data.augment.function is not None:
        withheld["data.augment.function"], changes["augment"] = data.augment.function, data.augment.model_copy(update={"function": None})
    if data.group is not None and data.group.regex is not None:  # a regular expression may take for ever
        withheld["data.group.regex"], changes["group"] = data.group.regex, None
    changes |= {"allow_pipe": False, "cache_dir": None, "cache_shared": False, "workers": "auto" if data.workers == "auto" else min(data.workers, _MAX_WORKERS)}
    usual = DataConfig()
    changes |= {name: min(getattr(data, name), getattr(usual, name)) for name in ("max_pixels", "max_file_bytes")}
    return config.model_copy(update={"data": data.model_copy(update=changes)}), withheld


# ---- what is recorded


def is_own(sha256: str) -> bool:
    """Whether a run of this user wrote a file of this hash."""
    return _recorded("made", sha256)


def note_made(path: Path, log: Log) -> None:
    """Record that a run of this user wrote `path`. If that fails, `log` gets a line."""
    try:
        data = read_regular(path, max_bytes=_MAX_FILE_BYTES)
    except OSError as error:
        log(f"{path} cannot be recorded as yours: {error.strerror or error}")
        return
    _record("made", hashlib.sha256(data).hexdigest(), {"path": str(path.absolute())}, log, f"other commands will treat {path} as somebody else's")


def is_allowed(function: str, sha256: str) -> bool:
    """Whether a function may be called for the model.json of this hash: a run of this user wrote it, or --trust was given."""
    return is_own(sha256) or _recorded(function, sha256)


def may_call(function: str, options: Mapping[str, Any], *, file: Path, sha256: str, trust: bool, log: Log) -> None:
    """UserError unless `function`, which `file` (a model.json of this hash) names, may be called: a run of this user wrote the file, or it is trusted."""
    if is_allowed(function, sha256):
        return
    call = f"{function}({', '.join(f'{name}={value!r}' for name, value in options.items())})"[:500]
    if not trust:
        raise UserError(
            f"{file} was not written by a run of yours, and its network is built by calling the function {call}, which can do anything on this machine; "
            f"if you trust that code, add --trust (trust=True in Python), which is remembered in {own_file()}"
        )
    log(f"{file}: calling {call}, trusted from now on for this model.json ({own_file()})")
    _record(function, sha256, {}, log, "--trust will be needed again")


def _recorded(what: str, sha256: str) -> bool:
    return (what, sha256) in _noted or (what, sha256) in _read()


def _read() -> set[tuple[str, str]]:
    """(function, sha256) and ("made", sha256) of all lines; other lines are ignored."""
    found = set()
    try:
        path = own_file()
        if path.stat().st_uid != os.geteuid():
            return set()  # another user's, where $XDG_CONFIG_HOME is shared
        lines = read_regular(path, max_bytes=_MAX_FILE_BYTES).splitlines()
    except (OSError, UserError):
        return set()
    for line in lines:
        with suppress(UserError):
            entry = parse_json(line, str(path))
            if isinstance(entry, dict):
                found |= {("made", str(entry["made"]))} if "made" in entry else {(str(entry.get("function")), str(entry.get("sha256")))}
    return found


def _record(what: str, sha256: str, more: Mapping[str, str], log: Log, otherwise: str) -> None:
    known = _recorded(what, sha256)
    _noted.add((what, sha256))
    if known:
        return
    entry = {"made": sha256, **more} if what == "made" else {"function": what, "sha256": sha256, **more}
    try:
        path = own_file()
    except UserError as error:
        log(f"{error}: {otherwise}")
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            flock(file)
            file.write((json.dumps(entry) + "\n").encode())
    except OSError as error:
        log(f"{path} cannot be written ({error.strerror or error}): {otherwise}")
