"""Recipes, options and stored configs of strangers: a config, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dtl.config import Config, flat, load_config, resolve_config
from dtl.config.models import sides
from dtl.config.own import needs_record, parse_stored
from dtl.data.remote.address import is_remote
from dtl.errors import UserError

BASE = Config.model_validate({"data": {"train": "photos", "val": "more"}, "phases": {"head": {"train": "head", "epochs": 1}, "all": {"epochs": 2}}})
OTHERS = ["transfer.source", "transfer.by", "model.options.depth", "phases", "data", "run", "model.options", "no.such", "data.tarin"]
KEYS = [*sorted(flat(BASE.to_dict())), *OTHERS]
SOURCES = ["pipe:touch x", "http://u:p@h/x?t=1", "s3://b/{0..9}.tar", "os:system", "hf-hub:o/n", "../..", "/", "a\nb", "\x1b[31m", "\0", "x" * 5000]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(SOURCES)
    | st.sampled_from([10**30, -1, 0, 1e308, "all", "head"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)
changes = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """The base's sections with these values under their dotted names, where there is room for them."""
    sections = BASE.to_dict()
    for dotted, value in options.items():
        *parents, last = dotted.split(".")
        node: Any = sections
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
            node = {} if node is None else node
        if isinstance(node, dict):
            node[last] = value
    return sections


def one_line(error: UserError) -> None:
    assert str(error).strip()
    assert len(str(error).splitlines()) == 1 or not str(error).isprintable()  # what prints it makes it one line
    assert len(str(error)) < 50_000


@given(changes)
def test_options_of_python(options: dict[str, Any]) -> None:
    try:
        config, name = resolve_config(BASE.to_dict(), options)
    except UserError as error:
        one_line(error)
        return
    assert "/" not in name
    assert Config.model_validate(config.to_dict()) == config


@given(changes)
def test_recipes_of_python(options: dict[str, Any]) -> None:
    try:
        resolve_config(changed(options), {})
    except UserError as error:
        one_line(error)


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.text(max_size=12) | st.sampled_from(["[[[", "{a: &a [*a]}", ".inf", "!!set {a}", "2024-13-01", *SOURCES]))))
def test_options_of_the_command_line(options: list[tuple[str, str]]) -> None:
    try:
        load_config([word for name, value in options for word in (f"--{name}={value}",)])
    except UserError as error:
        one_line(error)


@given(changes | st.dictionaries(st.text(max_size=6), values, max_size=3))
def test_a_stored_config_is_harmless(options: dict[str, Any]) -> None:
    text = yaml.safe_dump(changed(options))
    try:
        stored = parse_stored(text.encode(errors="surrogatepass"), "run/config.yaml", own=False)
    except UserError as error:
        one_line(error)
        return
    data = stored.config.data
    assert not any(is_remote(one) for one in (data.train, data.val, data.test, data.names) if one is not None)
    assert (data.allow_pipe, data.cache_dir) == (False, None)
    assert data.workers == "auto" or data.workers <= 8
    assert data.image_size == "auto" or max(sides(data.image_size)) <= 4096
    assert data.augment.function is None
    assert all("/" not in name and name.isprintable() for name in stored.config.phases)
    assert not needs_record(stored.config) or ":" in stored.config.model.name


@given(st.binary(max_size=200))
def test_any_bytes_as_a_stored_config(data: bytes) -> None:
    try:
        parse_stored(data, "run/config.yaml", own=False)
    except UserError as error:
        one_line(error)


@pytest.mark.parametrize("kind", ["device", "folder", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    import os

    from dtl.config.own import stored_config

    path = tmp_path / "config.yaml"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        stored_config(tmp_path)
