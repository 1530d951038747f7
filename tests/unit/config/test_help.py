"""The help and the reference page, made from the config models."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from dtl.config import Config, builtin_recipes
from dtl.config.help import help_text, reference, sections


def test_help_and_reference_name_and_describe_every_key() -> None:
    keys = [row[0] for _, rows in sections() for row in rows]
    assert len(keys) > 70
    assert not [row[0] for _, rows in sections() for row in rows if not row[3]], "keys without a description"
    for key in keys:
        assert f"--{key} " in help_text()
        assert f"`{key}`" in reference()


def test_every_builtin_recipe_stands_in_the_usage() -> None:
    usage = help_text().partition("data:")[0]
    assert all(name in usage for name in builtin_recipes())


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("data.micro_batch_size", "auto|INT", "auto"),
        ("data.train", "TEXT", ""),
        ("data.val_fraction", "FLOAT", "0.0"),
        ("run.debug", "true|false", "false"),
        ("checkpoint.async", "true|false", "true"),
        ("data.augment.randaugment", "[INT, INT]", ""),
        ("model.options", "{KEY: VALUE}", "{}"),
        ("phases.NAME.mixup", "FLOAT", "0.0"),
        ("precision", "auto|no|bf16|fp16", "auto"),
    ],
)
def test_what_a_value_looks_like_and_its_default(key: str, kind: str, default: str) -> None:
    rows = {row[0]: row for _, section in sections() for row in section}
    assert rows[key][1:3] == (kind, default)
    assert f"(default: {default})" in help_text(10_000).partition(f"--{key} {kind}")[2].splitlines()[1] or not default


def test_every_section_is_there_once_and_what_has_none_comes_last() -> None:
    titles = [title for title, _ in sections()]
    assert titles[-1] == "other"
    assert len(set(titles)) == len(titles)
    plain = {row[0] for row in dict(sections())["other"]}
    assert set(titles) - {"other"} | plain == set(get_type_hints(Config)) & set(Config.model_fields)


def test_lines_are_wrapped_and_cells_stay_cells() -> None:
    long = [line for line in help_text(72).splitlines() if line.startswith(" " * 8) and len(line) > 72]
    assert not long
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
