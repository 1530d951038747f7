"""Foreign files, JSON and YAML: refused in one line, bounded while reading, and nothing else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dtl import untrusted
from dtl.errors import UserError
from dtl.untrusted import Count, FileName, Record, RelativePath, Sha256, Text, as_text, open_regular, parse_json, parse_yaml, read_json, read_regular, read_yaml


class Shard(Record):
    name: FileName
    folder: RelativePath = ""
    sha256: Sha256
    size: Count
    title: Text = ""
    share: float = 0.0


GOOD = {"name": "a.tar", "sha256": "0" * 64, "size": 3}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "../a.tar"}, "name: '../a.tar' must be a file name without a folder"),
        ({"name": ".."}, "must be a file name without a folder"),
        ({"name": "a\n.tar"}, "must be a file name without a folder"),
        ({"name": "a\0"}, "must be a file name without a folder"),
        ({"name": "x" * 256}, "must be a file name without a folder"),
        ({"name": 3}, "name: must be a string"),
        ({"folder": "/etc"}, "folder: '/etc' leads outside the folder"),
        ({"folder": "a/../../b"}, "leads outside"),
        ({"sha256": "/home/me/work"}, "sha256: "),
        ({"sha256": "0" * 63 + "\n"}, "sha256: "),
        ({"sha256": "0" * 64 + "\n"}, "sha256: "),
        ({"size": -1}, "size: "),
        ({"size": 1 << 63}, "size: "),
        ({"size": True}, "size: must be a whole number"),
        ({"size": 2.5}, "size: must be a whole number"),
        ({"size": None}, "size: must be a whole number"),
        ({"title": "a\0b"}, "title: holds a NUL character"),
    ],
)
def test_a_field_that_is_not_what_it_should_be(change: dict[str, Any], complaint: str) -> None:
    assert Shard.parse(json.dumps(GOOD), "here").size == 3
    with pytest.raises(UserError) as raised:
        Shard.parse(json.dumps(GOOD | change), "manifest.json")
    assert str(raised.value).startswith("manifest.json: ")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "[", "null", "[1]", '"a"', "[" * 5000, '{"size": 1e999}', '{"share": NaN}', '{"share": -Infinity}', "9" * 6000, "\ufeff{}"]
)
def test_text_that_is_no_such_object(text: str) -> None:
    with pytest.raises(UserError, match=r"^origin: "):
        Shard.parse(text, "origin")


def test_a_missing_field_is_named_and_an_unknown_one_ignored() -> None:
    with pytest.raises(UserError, match=r"^origin: size is missing$"):
        Shard.parse(json.dumps({"name": "a", "sha256": "0" * 64}), "origin")
    assert not hasattr(Shard.parse(json.dumps(GOOD | {"new": 1}), "origin"), "new")


@pytest.mark.parametrize("text", ["1e999", "[NaN]", "-Infinity", '{"a": ["b\\u0000"]}', '{"a\\u0000": 1}', "[" * 300 + "]" * 300, "9" * 6000, "1" + 400 * "0"])
def test_plain_json_without_a_form_has_no_such_values_either(text: str) -> None:
    with pytest.raises(UserError, match=r"^here: "):
        parse_json(text, "here")


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_gives_what_the_standard_library_gives_or_refuses(value: Any) -> None:
    def fine(one: Any) -> bool:
        if isinstance(one, float):
            return math.isfinite(one)
        if isinstance(one, int):
            return abs(one) < 1 << 64
        if isinstance(one, str):
            return "\0" not in one and not any(0xD800 <= ord(letter) < 0xE000 for letter in one)
        if isinstance(one, dict):
            return all(fine(key) and fine(inner) for key, inner in one.items())
        return all(map(fine, one)) if isinstance(one, list) else True

    text = json.dumps(value)
    if fine(value):
        assert parse_json(text, "x") == value
    else:
        with pytest.raises(UserError):
            parse_json(text, "x")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:0123456789.eE-ntfalsru\\ ', max_size=200).map(str.encode))
def test_any_bytes_are_values_or_one_line(data: bytes) -> None:
    refusal = ""
    try:
        parse_json(data, "x")
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


# ---- YAML


BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BILLION, "values"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 2000 + "]" * 2000, "nest"),
        ("- " * 2000 + "x", "nested deeper"),
        ("a: .inf", "finite"),
        ("a: [-.inf, .nan]", "finite"),
        ("a: 1.0e+999", "finite"),
        ('a: "b\\0"', "NUL"),
        ("a: 2025-13-45", "not valid YAML"),
        ("a: " + "9" * 6000, "not valid YAML"),
        ("? [a, b]\n: c", "not valid YAML"),
        ("a: !!timestamp ''", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!float ''", "not valid YAML"),
        ("a: !!python/object/apply:os.system [touch PWNED]", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: \x1b", "not valid YAML"),
        ("x" * (2 << 20), "characters"),
        ("[" + "1," * 150_000 + "]", "values"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_yaml_that_grows_nests_or_is_none(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "config.yaml")
    message = str(raised.value)
    assert message.startswith("config.yaml: ")
    assert complaint in message
    assert "\n" not in message


def test_yaml_with_few_aliases_stays_possible() -> None:
    text = "base: &base {lr: 1.0e-3, steps: [1, 2]}\na: {<<: *base, lr: 2}\nb: *base\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120) | st.text(alphabet="abc:-[]{}&*!|> \n\t#'\"?,.0123456789~<", max_size=120))
def test_any_text_is_yaml_or_one_line(text: str) -> None:
    refusal = ""
    try:
        value = parse_yaml(text, "x")
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if not refusal:
        assert repr(value) == repr(yaml.load(text, Loader=yaml.CSafeLoader))


# ---- files


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    for name, kind in (("pipe", "a named pipe"), ("folder", "a folder")):
        with pytest.raises(UserError, match=f"{name}: it is {kind}, not a regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(UserError, match="/dev/zero: it is a device"):
        read_regular("/dev/zero", max_bytes=10)
    with pytest.raises(OSError, match="loop"):
        open_regular(tmp_path / "loop")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"abc"


def test_the_limit_holds_while_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert read_regular(tmp_path / "file", max_bytes=11) == b"x" * 11
    with pytest.raises(UserError, match="it has 11 bytes, more than the 10 that are allowed"):
        read_regular(tmp_path / "file", max_bytes=10)
    with pytest.raises(UserError, match="more than the 5 bytes"):
        read_regular("/proc/self/status", max_bytes=5)  # its size is 0


def test_files_of_json_yaml_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert Shard.read(tmp_path / "a.json") == Shard(**GOOD)
    assert read_json(tmp_path / "a.json") == GOOD
    (tmp_path / "a.yaml").write_text("a: 1")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1}
    (tmp_path / "latin").write_bytes("ä: 1".encode("latin-1"))
    for read in (read_yaml, untrusted.read_text):
        with pytest.raises(UserError, match=r"latin: not UTF-8: .* at byte 0"):
            read(tmp_path / "latin")
    (tmp_path / "bom.txt").write_bytes("\ufeffcat\n".encode())
    assert untrusted.read_text(tmp_path / "bom.txt") == "cat\n"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_key_that_stands_twice_in_json_written_by_hand() -> None:
    text = '{"a": {"cat": 1, "dog": 2, "cat": 3}}'
    assert parse_json(text, "x") == {"a": {"cat": 3, "dog": 2}}
    with pytest.raises(UserError, match=r"^names.json: the key 'cat' stands twice in one object$"):
        parse_json(text, "names.json", by_hand=True)
    assert parse_json('[{"a": 1}, {"a": 2}]', "x", by_hand=True) == [{"a": 1}, {"a": 2}]


def test_yaml_of_names_is_text() -> None:
    text = "001: no\n1e3: [2024-11-28, ~, 0x10]\n"
    assert parse_yaml(text, "x", prepare=as_text) == {"001": "no", "1e3": ["2024-11-28", None, "0x10"]}
