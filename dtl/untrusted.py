"""Files, JSON and YAML that somebody else may have written: opened, bounded and checked here, before anything uses them.

Whatever is wrong with them is a UserError of one line that begins with where it was found. Nothing in here runs, deletes or creates anything.
Limits hold while reading, not afterwards: of a file its kind and its bytes, of a text its depth, its number of values, and its numbers.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable
from typing import Annotated, Any, BinaryIO, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from dtl.errors import UserError

MAX_TEXT_BYTES = 64 << 20
"""Of one JSON file; a manifest of 100,000 shards takes 25 MB."""
MAX_YAML_BYTES = 1 << 20
_MAX_YAML_VALUES, _MAX_YAML_DEPTH = 100_000, 50
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def open_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file (or a link to one) for reading, unbuffered. Never waits for a writer, and never starts a device.

    Raises UserError for what is no regular file, or is larger than `max_bytes`; OSError where it cannot be opened.
    """
    check_regular(path, os.stat(path), max_bytes=max_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor), max_bytes=max_bytes)  # it may have been exchanged in between
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], facts: os.stat_result, *, max_bytes: int | None = None) -> None:
    """UserError unless `facts` are those of a regular file of at most `max_bytes`."""
    if not stat.S_ISREG(facts.st_mode):
        kind = next((name for is_one, name in _KINDS if is_one(facts.st_mode)), "no file")
        raise UserError(f"{os.fspath(path)}: it is {kind}, not a regular file")
    if max_bytes is not None and facts.st_size > max_bytes:
        raise UserError(f"{os.fspath(path)}: it has {facts.st_size:,} bytes, more than the {max_bytes:,} that are read of such a file")


def read_regular(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """All bytes of a regular file; the limit also holds for one that grows, and for one whose size is not known (as in /proc)."""
    with open_regular(path, max_bytes=max_bytes) as file:
        data = bytearray()
        while len(data) <= max_bytes and (block := file.read(min(1 << 20, max_bytes + 1 - len(data)))):
            data += block
    if len(data) > max_bytes:
        raise UserError(f"{os.fspath(path)}: it has more than the {max_bytes:,} bytes that are read of such a file")
    return bytes(data)


# ---- JSON


class Record(BaseModel):
    """The form of a JSON object: a subclass names its fields. Unknown keys are ignored: a later version may have added them."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> Self:
        """UserError where the file is not of this form; OSError where it cannot be read."""
        return cls.parse(read_regular(path, max_bytes=max_bytes), os.fspath(path))

    @classmethod
    def parse(cls, data: bytes | str, origin: str) -> Self:
        """From JSON text that was read at `origin`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise UserError(f"{origin}: {what_is_wrong(error)}") from None
        except RecursionError:  # of a validator; the parser has a limit of its own
            raise UserError(f"{origin}: nested too deep") from None


def parse_json(data: bytes | str, origin: str) -> Any:
    """Plain values of a JSON text whose form the caller checks. No NaN, no infinity, no NUL in a text, at most 200 levels."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON: {error}") from None
    check_values(value, origin)
    return value


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """`parse_json` of a regular file; OSError where it cannot be read."""
    return parse_json(read_regular(path, max_bytes=max_bytes), os.fspath(path))


def what_is_wrong(error: ValidationError) -> str:
    """The first fault that pydantic found, in plain words."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    kind, given = str(first["type"]), str(first["msg"])
    words = {"missing": "is missing", "json_invalid": f"not valid JSON: {given.removeprefix('Invalid JSON: ')}", "finite_number": "must be a finite number"}
    for type_name, meant in (("string_", "text"), ("int_", "a whole number"), ("float_", "a number"), ("bool_", "true or false"), ("list_", "a list")):
        words.setdefault(f"{type_name}type", f"must be {meant}")
    message = words.get(kind) or given.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Input ")
    return f"{place}: {message}" if place and kind != "missing" else f"{place} {message}".strip()


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def _plain_name(text: str) -> str:
    if text in ("", ".", "..") or "/" in text or any(ord(letter) < 32 or ord(letter) == 127 for letter in text) or len(os.fsencode(text)) > 255:
        raise ValueError(f"{text[:80]!r} is no plain file name (a name without a folder)")
    return text


def _relative_path(text: str) -> str:
    if text.startswith("/") or any(part == ".." for part in text.split("/")):
        raise ValueError(f"{text[:80]!r} leads outside the folder")
    return text


Text = Annotated[str, AfterValidator(_no_nul)]
"""Any text without NUL."""
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
FileName = Annotated[str, AfterValidator(_plain_name)]
"""The name of a file in a known folder: no path."""
RelativePath = Annotated[Text, AfterValidator(_relative_path)]
"""A path that stays inside the folder it is joined to (links aside)."""


def check_values(value: Any, origin: str) -> None:
    """UserError for an infinity, a NaN, or a NUL character anywhere in plain values."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise UserError(f"{origin}: {one} is not a finite number")
        if isinstance(one, str) and "\0" in one:
            raise UserError(f"{origin}: a text holds a NUL character")
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            rest += one


# ---- YAML


def parse_yaml(text: str, origin: str) -> Any:
    """Plain values of a YAML text: at most 1 MiB, 50 levels and 100,000 values, anchors counted as often as they are used."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{origin}: it has more than the {MAX_YAML_BYTES:,} characters that are read of such a file")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_growth(yaml.parse(io.StringIO(text), Loader=loader), origin)
        value = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, OverflowError, TypeError, RecursionError) as error:  # a date that does not exist, a number of 5,000 digits, a key that is a list
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    check_values(value, origin)
    return value


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """`parse_yaml` of a regular file in UTF-8; OSError where it cannot be read."""
    try:
        return parse_yaml(read_regular(path, max_bytes=MAX_YAML_BYTES).decode("utf-8"), os.fspath(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8: {error.reason} at byte {error.start}") from None


def _check_growth(events: Iterable[Any], origin: str) -> None:
    """Count the values as if each alias were written out, before anything is built ("billion laughs" has nine lines of them)."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor of each open list or mapping, and the count where it began
    count = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                raise UserError(f"{origin}: the anchor &{event.anchor} contains itself")
            count += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            count += 1
            opened.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > _MAX_YAML_VALUES:
            raise UserError(f"{origin}: more than {_MAX_YAML_VALUES:,} values (aliases counted as often as they are used)")
        if len(opened) > _MAX_YAML_DEPTH:
            raise UserError(f"{origin}: nested deeper than {_MAX_YAML_DEPTH} levels")


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A regular file as UTF-8 text."""
    try:
        return read_regular(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8: {error.reason} at byte {error.start}") from None
