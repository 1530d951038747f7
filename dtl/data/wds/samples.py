"""One shard from another tool: its members grouped into samples as webdataset does it, and the label of each."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtl.data.decoding.decode import DecodeError, ImageHeader, probe
from dtl.data.decoding.headers import DEFAULT_LIMITS, Limits
from dtl.data.sources.base import IMAGE_EXTENSIONS
from dtl.data.wds.tar import Member, TarFile, refuse_compressed
from dtl.errors import UserError
from dtl.files import open_regular

# As webdataset calls them: an extension without its dot, or the plain word.
IMAGE_FIELDS = frozenset(extension[1:] for extension in IMAGE_EXTENSIONS) | {"img", "image"}
FOLDER = "folder"  # as a label field: the last folder of the key
# Webdataset's own rule: the key ends at the first dot of the last part of the name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
# Larger members other than the image are not looked at for a label.
_MAX_LABEL_BYTES = 2**20

Label = int | str


@dataclass(frozen=True)
class Rules:
    """Where image and label of a sample are. None: the one image there is; `cls`, or else the key's folder."""

    image_field: str | None = None
    label_field: str | None = None


@dataclass(frozen=True)
class Sample:
    """`label` and `header` are None where the sample cannot be used, with the reason in `problem`; then `offset` is that of its first member."""

    key: str
    offset: int
    size: int
    crc: int
    header: ImageHeader | None
    label: Label | None
    rule: str
    """Where the label came from: cls, folder, json, or another extension."""
    data: bytes
    problem: str = ""


@dataclass
class Ignored:
    """Members that belong to no sample."""

    count: int = 0
    first: str = ""


class _Problem(Exception):
    """This sample cannot be used; the message is the reason."""


@dataclass
class _Group:
    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        return next(iter(self.members.values())).offset


def read_samples(tar: TarFile, rules: Rules, ignored: Ignored, limits: Limits = DEFAULT_LIMITS) -> Iterator[Sample]:
    """Samples in their order, as webdataset's grouping gives them. Raises DamagedTar; UserError for a member that is there twice."""
    group: _Group | None = None

    def wanted(name: str, size: int) -> bool:
        _, extension = split_name(name)
        if extension is None:
            return False
        return (_is_image(extension, rules) and size <= limits.max_file_bytes) or (_may_label(extension, rules) and size <= _MAX_LABEL_BYTES)

    for member in tar.members(wanted):
        key, extension = split_name(member.name)
        if key is None or extension is None:
            ignored.count += 1
            ignored.first = ignored.first or member.name
            continue
        if group is None or key != group.key:
            if group is not None:
                yield _sample(group, rules, limits)
            group = _Group(key)
        if extension in group.members:
            raise UserError(f"{tar.name}: member {shown(member.name)} at byte {member.offset} occurs twice; write the tar again")
        group.members[extension] = member
    if group is not None:
        yield _sample(group, rules, limits)


def open_tar(path: Path, name: str | None = None) -> Any:
    """The file, opened for reading. UserError where it is not there, or compressed. `name`: of a remote one, for messages."""
    try:
        refuse_compressed(path, name)
        return io.BufferedReader(open_regular(path), 1 << 17)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def split_name(name: str) -> tuple[str | None, str | None]:
    """(key, extension in lower case), or (None, None) for what webdataset skips: no extension, hidden, or `__meta__`."""
    found = None if _META.match(name) else _NAME.fullmatch(name)
    return (None, None) if found is None else (found[1], found[2].lower())


def shown(name: str) -> str:
    """A name for a message: printable, in one line."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def _is_image(extension: str, rules: Rules) -> bool:
    if rules.image_field is not None:
        return extension == rules.image_field
    return extension.rpartition(".")[2] in IMAGE_FIELDS


def _may_label(extension: str, rules: Rules) -> bool:
    return extension in (("cls", "json") if rules.label_field is None else (rules.label_field, "json"))


def _sample(group: _Group, rules: Rules, limits: Limits) -> Sample:
    try:
        image = _image(group, rules)
        if image.data is None:
            raise _Problem(f"its image has {image.size:,} bytes, more than the {limits.max_file_bytes:,} that are allowed (data.max_file_bytes)")
        label, rule = _label(group, rules)
        if image.size >= 2**32:
            raise _Problem(f"the image has {image.size:,} bytes, more than an index can hold")
        header = probe(image.data, limits.max_pixels)
    except (_Problem, DecodeError) as error:
        reason = str(error) if isinstance(error, _Problem) else f"its image: {error}"
        return Sample(group.key, group.offset, 0, 0, None, None, "", b"", reason)
    return Sample(group.key, image.offset, image.size, zlib.crc32(image.data), header, label, rule, image.data)


def _image(group: _Group, rules: Rules) -> Member:
    images = [extension for extension in group.members if _is_image(extension, rules)]
    if rules.image_field is None:  # an array beside an image may be anything
        images = [extension for extension in images if not extension.endswith("npy")] or images
    exact = [extension for extension in images if "." not in extension]
    chosen = exact or images
    if not chosen:
        missing = f"no member .{rules.image_field}" if rules.image_field else "no image"
        raise _Problem(f"it has {missing}, only {_names(group)}")
    if len(chosen) > 1:
        dotted = "" if exact else " (a key ends at the first dot of its name)"
        raise _Problem(f"it has {len(chosen)} images: {', '.join('.' + shown(one) for one in chosen)}{dotted}; choose one with --image-field")
    return group.members[chosen[0]]


def _label(group: _Group, rules: Rules) -> tuple[Label, str]:
    wanted = rules.label_field
    if wanted is None:
        if "cls" in group.members:
            return _text_label(group, "cls"), "cls"
        if "json" in group.members:
            fields = ", ".join(shown(str(name)) for name in list(_json(group))[:20])
            raise _Problem(f"it has no .cls; choose where the label is: --label-field with a field of its .json ({fields}), or --label-field folder")
        wanted = FOLDER
    if wanted == FOLDER:
        folder = group.key.rpartition("/")[0].rpartition("/")[2]
        if folder in ("", ".", ".."):
            where = "no .cls, and no" if rules.label_field is None else "no"
            raise _Problem(f"it has {where} folder in its key that could be its label, only {_names(group)}")
        return folder, FOLDER
    if wanted in group.members:
        return _text_label(group, wanted), wanted
    if "json" not in group.members:
        raise _Problem(f"it has neither a member .{wanted} nor .json, only {_names(group)}")
    return _json_label(group, wanted), "json"


def _text_label(group: _Group, extension: str) -> Label:
    data = group.members[extension].data
    if data is None:
        raise _Problem(f"its .{extension} has {group.members[extension].size:,} bytes, too many for a label")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise _Problem(f"its .{extension} is not text") from None
    if not text or "\n" in text:
        raise _Problem(f"its .{extension} is empty" if not text else f"its .{extension} has several lines; a label has one")
    return _number_or_name(text)


def _json(group: _Group) -> dict[str, Any]:
    try:
        if group.members["json"].data is None:
            raise _Problem(f"its .json has {group.members['json'].size:,} bytes, too many for labels")
        value = json.loads(group.members["json"].data)
    except (ValueError, RecursionError):
        raise _Problem("its .json is not valid JSON") from None
    if not isinstance(value, dict):
        raise _Problem("its .json is not a JSON object")
    return value


def _json_label(group: _Group, path: str) -> Label:
    value: Any = _json(group)
    known = value
    if path in value:
        value = value[path]
    else:
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                raise _Problem(f"its .json has no field {path}; it has {', '.join(shown(str(name)) for name in list(known)[:20])}")
            value = value[part]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _Problem(f"the field {path} of its .json is {shown(json.dumps(value)[:60])}, not a number or a name")
    return value if isinstance(value, int) else _number_or_name(value.strip())


def _number_or_name(text: str) -> Label:
    # Only what is written as a plain number: "007" and "1_000" are names.
    return int(text) if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", text) else text


def _names(group: _Group) -> str:
    return ", ".join("." + shown(extension) for extension in list(group.members)[:10])
