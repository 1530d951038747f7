"""Files, JSON and YAML that somebody else may have written: opened, bounded and checked here, before anything uses them.

Whatever is wrong with them is a UserError of one line that begins with where it was found. Nothing in here runs, deletes or creates anything.
Limits hold while reading, not afterwards: of a file its kind and its bytes, of a text its depth, its number of values, and its numbers.
pydantic and yaml are imported by the first text that needs them: helper processes that start in 0.3 s import this module, and read none.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast, dataclass_transform

from dtl.errors import UserError
from dtl.files import check_regular as check_regular
from dtl.files import open_regular as open_regular
from dtl.files import read_regular as read_regular

if TYPE_CHECKING:
    import yaml
    from pydantic import ValidationError
    from pydantic_core import SchemaValidator

MAX_TEXT_BYTES = 64 << 20
"""Of one JSON file."""
MAX_VALUES = 2_000_000
"""Of one JSON file, nested ones included."""
MAX_LINE_BYTES = 1 << 20
MAX_YAML_BYTES = 1 << 20
_MAX_YAML_VALUES, _MAX_YAML_DEPTH = 100_000, 50


# ---- JSON


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """The form of a JSON object: a subclass names its fields, and is a frozen dataclass of them. Unknown keys are ignored: a later version may have added them.

    Only `read` and `parse` check the types; what is made in code is trusted.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    max_bytes: ClassVar[int] = MAX_TEXT_BYTES
    max_values: ClassVar[int] = MAX_VALUES
    finite: ClassVar[bool] = True
    """Whether NaN and infinities are refused."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """UserError where the file is not of this form; OSError where it cannot be read."""
        return cls.parse(read_regular(path, max_bytes=cls.max_bytes), os.fspath(path))

    @classmethod
    def parse(cls, data: bytes | str, origin: str) -> Self:
        """From JSON text that was read at `origin`."""
        return cls.from_values(_json(data, origin, max_values=cls.max_values, finite=cls.finite), origin)

    @classmethod
    def from_values(cls, value: Any, origin: str) -> Self:
        """From plain values, as JSON gives them."""
        made: Self = check_form(cls, value, origin)
        return made


def check_form(kind: type[Any], value: Any, origin: str) -> Any:
    """`value`, plain as JSON gives it, as the dataclass `kind`; UserError where a field has not its type."""
    from pydantic import ValidationError

    try:
        return _form_of(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{origin}: {what_is_wrong(error)}") from None
    except RecursionError:  # of a validator; the parser has a limit of its own
        raise UserError(f"{origin}: nested too deeply") from None


_forms: dict[type[Any], SchemaValidator] = {}


def _form_of(kind: type[Any]) -> SchemaValidator:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    if kind not in _forms:
        schema = TypeAdapter(kind).core_schema
        _as_json_has_it(schema)
        _forms[kind] = SchemaValidator(schema)
    return _forms[kind]


def _as_json_has_it(schema: Any) -> None:
    """Lists may become tuples, objects dataclasses, but no text a number. And the first fault ends it: pydantic keeps a record of each.

    `validate_json` would do the former. But of two million wrong values it takes 3 GB and 20 s, since each record holds what was found as Python values.
    """
    rest = [schema]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            if one.get("type") in ("tuple", "list", "dict"):
                one["fail_fast"] = True
            elif one.get("type") in ("str", "int", "float", "bool"):
                one["strict"] = True
            rest += one.values()
        elif isinstance(one, list):
            rest += one


def _json(data: bytes | str, origin: str, *, max_values: int, finite: bool = True) -> Any:
    from pydantic_core import from_json

    _check_count(data, origin, max_values)
    try:
        return from_json(data, allow_inf_nan=not finite)
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON: {error}") from None


def _check_count(data: bytes | str, origin: str, most: int) -> None:
    """More commas than values are allowed: found before any value is made (each takes 30 bytes and more)."""
    found = data.count(b",") + data.count(b"[") + data.count(b"{") if isinstance(data, bytes) else data.count(",") + data.count("[") + data.count("{")
    if found > most:
        raise UserError(f"{origin}: it holds more than {most:,} values")


class Check:
    """In an annotation: `check(value)` returns the value, or raises ValueError. pydantic calls it after its own check of the type."""

    def __init__(self, check: Callable[[Any], Any]) -> None:
        self.check = check

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


def only_version(known: int, *, otherwise: str = "") -> Check:
    """For the version of a file's form: any but `known` is refused; `otherwise`: what to do then."""

    def check(number: int) -> int:
        if number != known:
            raise ValueError(f"format version {number}, but this dtl reads version {known}{otherwise and f'; {otherwise}'}")
        return number

    return Check(check)


def parse_json(data: bytes | str, origin: str, *, finite: bool = True, by_hand: bool = False) -> Any:
    """Plain values of a JSON text whose form the caller checks. No NaN and no infinity where `finite`, no NUL in a text, at most 200 levels.

    In a text that people write (`by_hand`), no object holds a key twice.
    """
    value = _json(data, origin, max_values=MAX_VALUES, finite=finite)
    check_values(value, origin, finite=finite)
    if by_hand:
        json.loads(data, object_pairs_hook=lambda pairs: _check_pairs(pairs, origin))
    return value


def _check_pairs(pairs: list[tuple[str, Any]], origin: str) -> None:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"{origin}: the key {twice[0][:80]!r} stands twice in one object")


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES, finite: bool = True, by_hand: bool = False) -> Any:
    """`parse_json` of a regular file; OSError where it cannot be read."""
    return parse_json(read_regular(path, max_bytes=max_bytes), os.fspath(path), finite=finite, by_hand=by_hand)


def json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The object of each line of a regular file; an empty one for a line that is none (the last of a file that is being written), or has over 1 MiB.

    OSError where the file cannot be read.
    """
    with io.BufferedReader(cast(io.RawIOBase, open_regular(path))) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            whole = line.endswith(b"\n") or len(line) <= MAX_LINE_BYTES
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                pass  # the rest of a line that is too long
            yield json_line(line) if whole else {}


def json_line(line: bytes) -> dict[str, Any]:
    """The object that a line holds; an empty one where it holds none."""
    try:
        value = parse_json(line, "")
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def as_utf8(text: str) -> str:
    r"""A name as JSON can hold it: of one that is not UTF-8 (half a surrogate pair in Python) the bytes are spelled, `\udcff`."""
    return text.encode(errors="backslashreplace").decode()


def what_is_wrong(error: ValidationError) -> str:
    """The first fault that pydantic found, in plain words, after the place where it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"] if part != "[key]")
    return f"{place} {in_words(first)}".strip() if first["type"] == "missing" or not place else f"{place}: {in_words(first)}"


def in_words(fault: Mapping[str, Any]) -> str:
    """What one of the faults of a pydantic.ValidationError says, in plain words."""
    kind, message = str(fault["type"]), str(fault["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        last = fault["loc"][-1]
        return f"has too few values: number {last + 1} is missing" if isinstance(last, int) else "is missing"
    for prefix, meant in _KINDS.items():
        if kind.startswith(prefix) and kind.removeprefix(prefix) in ("type", "parsing", "parsing_size", "from_float"):
            return f"must be {meant}"
    for theirs, ours in _PHRASES.items():
        message = message.replace(theirs, ours)
    return message


_KINDS = {
    "string_": "a string",
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "list_": "a list",
    "tuple_": "a list",
    "dict_": "an object",
    "model_": "a mapping",
    "dataclass_": "an object",
}
_PHRASES = {
    "Invalid JSON": "not valid JSON",
    "Input should be greater than or equal to": "must be at least",
    "Input should be greater than": "must be above",
    "Input should be less than or equal to": "must be at most",
    "Input should be less than": "must be below",
    "Input should be": "must be",
    "Tuple should have": "must have",
    "List should have": "must have",
    " items after validation": " values",
}


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def _plain_name(text: str) -> str:
    if text in ("", ".", "..") or "/" in text or any(ord(letter) < 32 or ord(letter) == 127 for letter in text) or len(os.fsencode(text)) > 255:
        raise ValueError(f"{text[:80]!r} must be a file name without a folder")
    return text


def _relative_path(text: str) -> str:
    if text.startswith("/") or any(part == ".." for part in text.split("/")):
        raise ValueError(f"{text[:80]!r} leads outside the folder")
    return text


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def _sha256(text: str) -> str:
    if not is_sha256(text):
        raise ValueError(f"{text[:80]!r} is not a SHA-256 (64 hexadecimal digits)")
    return text


def _count(number: int) -> int:
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{str(number)[:40]} is not an integer from 0 to 2^63")
    return number


def _plain(value: Any) -> Any:
    if fault := _fault_in(value):
        raise ValueError(fault)
    return value


def _plain_or_nan(value: Any) -> Any:
    if fault := _fault_in(value, finite=False):
        raise ValueError(fault)
    return value


_SHA256 = re.compile(r"[0-9a-f]{64}")

Text = Annotated[str, Check(_no_nul)]
"""Any text without NUL."""
Sha256 = Annotated[str, Check(_sha256)]
Count = Annotated[int, Check(_count)]
FileName = Annotated[str, Check(_plain_name)]
"""The name of a file in a known folder: no path."""
RelativePath = Annotated[str, Check(_no_nul), Check(_relative_path)]
"""A path that stays inside the folder it is joined to (links aside)."""
Plain = Annotated[Any, Check(_plain)]
"""Any JSON value whose numbers are finite and whose texts hold no NUL."""
PlainObject = Annotated[dict[str, Any], Check(_plain)]
NumbersObject = Annotated[dict[str, Any], Check(_plain_or_nan)]
"""Of a file that may hold numbers that are not finite (`Record.finite`)."""


def check_values(value: Any, origin: str, *, finite: bool = True) -> None:
    """UserError for an infinity or a NaN (where `finite`), a NUL character, or a number of more than 64 bits anywhere in plain values."""
    if fault := _fault_in(value, finite=finite):
        raise UserError(f"{origin}: {fault}")


def _fault_in(value: Any, *, finite: bool = True) -> str | None:
    rest = [value]
    while rest:
        one = rest.pop()
        if finite and isinstance(one, float) and not math.isfinite(one):
            return f"{one} is not a finite number"
        if isinstance(one, int) and abs(one) >= 1 << 64:
            return f"{str(one)[:40]}... is too large a number"
        if isinstance(one, str) and "\0" in one:
            return "a string holds a NUL character"
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            rest += one
    return None


# ---- YAML


class NotYaml(UserError):
    """A text that breaks YAML's rules (and no limit)."""


def parse_yaml(text: str, origin: str, *, prepare: Callable[[yaml.Node], None] | None = None) -> Any:
    """Plain values of a YAML text: at most 1 MiB, 50 levels and 100,000 values, anchors counted as often as they are used; no key twice in a mapping.

    `prepare` may change the tree of nodes before values are made of it.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{origin}: it has more than the {MAX_YAML_BYTES:,} characters that are allowed for such a file")
    import yaml

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_growth(yaml.parse(io.StringIO(text), Loader=kind), origin)
        loader = kind(text)
        node = loader.get_single_node()
        if node is not None:
            _check_keys(node, origin)
            if prepare:
                prepare(node)
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise NotYaml(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except (
        ValueError,
        OverflowError,
        TypeError,
        RecursionError,
        AttributeError,
        LookupError,
    ) as error:  # a date that does not exist, a number of 5,000 digits, a key that is a list
        raise NotYaml(f"{origin}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    check_values(value, origin)
    return value


def as_text(root: yaml.Node) -> None:
    """`prepare` for YAML in which all single values are names: 001 and no are text."""
    import yaml

    rest, seen = [root], set()
    while rest:
        node = rest.pop()
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"):
                node.tag = "tag:yaml.org,2002:str"
        elif id(node) not in seen:
            seen.add(id(node))
            rest += [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value


def _check_keys(root: yaml.Node, origin: str) -> None:
    """UserError where a mapping holds a key twice: YAML keeps the last one, in silence."""
    import yaml

    rest, seen = [root], set()
    while rest:
        node = rest.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                rest += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    line, name = key.start_mark.line + 1, (key.tag, key.value)
                    if name in lines:
                        place = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                        raise UserError(f"{origin}: the key {key.value[:80]!r} stands twice in one mapping, in {place}")
                    lines[name] = line
        else:
            rest += node.value


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """`parse_yaml` of a regular file in UTF-8; OSError where it cannot be read."""
    try:
        return parse_yaml(read_regular(path, max_bytes=MAX_YAML_BYTES).decode("utf-8"), os.fspath(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8: {error.reason} at byte {error.start}") from None


def _check_growth(events: Iterable[Any], origin: str) -> None:
    """Count the values as if each alias were written out, before anything is built ("billion laughs" has nine lines of them)."""
    import yaml

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
            raise UserError(f"{origin}: more than {_MAX_YAML_VALUES:,} values (aliases counted at each use)")
        if len(opened) > _MAX_YAML_DEPTH:
            raise UserError(f"{origin}: nested deeper than {_MAX_YAML_DEPTH} levels")


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A regular file as UTF-8 text."""
    try:
        return read_regular(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8: {error.reason} at byte {error.start}") from None
