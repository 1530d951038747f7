"""Names that other libraries give to the layers of known networks: a table (`dialects.yaml`), tried where a file's own names lead to a refusal.

A dialect only renames. The plan is then made and judged like any other, by names and shapes, and nothing is loaded that such a plan would not load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dtl.errors import UserError
from dtl.untrusted import read_yaml

TABLE = Path(__file__).with_name("dialects.yaml")


@dataclass(frozen=True)
class Dialect:
    """`when`: patterns that must each fit some name; `rules`: (pattern, replacement), applied one after the other; `aside`: names that are not meant."""

    name: str
    when: tuple[re.Pattern[str], ...]
    rules: tuple[tuple[re.Pattern[str], str], ...]
    aside: tuple[re.Pattern[str], ...] = ()

    def is_spoken_in(self, names: Sequence[str]) -> bool:
        return all(any(pattern.search(name) for name in names) for pattern in self.when)

    def translated(self, name: str) -> str:
        for pattern, replacement in self.rules:
            name = pattern.sub(replacement, name)
        return re.sub(r"<(\d+)\+(\d+)>", lambda found: str(int(found[1]) + int(found[2])), name)


@dataclass(frozen=True)
class Translation:
    """`names`: the source's name -> the name that the network gives to the same tensor; those set aside are not in it."""

    dialect: str
    names: dict[str, str]


def spoken(names: Sequence[str]) -> list[Dialect]:
    """The dialects whose evidence these names hold."""
    return [each for each in _table()[0] if each.is_spoken_in(names)]


def translations(source: Sequence[str], target: Sequence[str]) -> Iterator[Translation]:
    """The readings of the source's names in the words of the network, by each dialect whose evidence the file holds.

    A dialect of the network is read backwards: the names of timm, or those to which the file's own dialect leads, become the names that it translates.
    """
    dialects, targets = _table()
    into = next((each for each in targets if each.is_spoken_in(target)), None)
    back = next(({each.name: _backwards(each, target)} for each in dialects if into is None and each.is_spoken_in(target)), {})
    for dialect in spoken(source) or ([Dialect("timm", (), ())] if back else []):
        meant = [name for name in source if not any(pattern.search(name) for pattern in dialect.aside)]
        names = {name: dialect.translated(name) for name in meant}
        if into is not None:
            names = {name: into.translated(now) for name, now in names.items()}
        for own in back.values():
            names = {name: own.get(now, now) for name, now in names.items()}
        if len(set(names.values())) == len(names):
            yield Translation(" and of ".join([dialect.name, *back]), names)


_FUSED, _IN_PROJ = re.compile(r"(.*\.)qkv\.(weight|bias)"), re.compile(r"(.*\.)in_proj_(?:weight|bias)")
_PROJECTION = re.compile(r"(^|\.)(?:query|q|q_proj)\.(\w+)$")


def _backwards(dialect: Dialect, names: Sequence[str]) -> dict[str, str]:
    """timm's names -> those of `names` that the dialect translates into them. Where these have q, k and v apart, the fused name stands for the three; where
    they are one parameter of nn.MultiheadAttention, their names apart lead into that module."""
    found = {dialect.translated(name): name for name in names}
    joined = [(_PROJECTION.sub(r"\1qkv.\2", now), _PROJECTION.sub(r"\1qkv.\2", own)) for now, own in found.items() if _PROJECTION.search(own)]
    apart = [
        (f"{fused[1]}{part}.{fused[2]}", f"{whole[1]}{part}.{fused[2]}")
        for now, own in found.items()
        if (fused := _FUSED.fullmatch(now)) and (whole := _IN_PROJ.fullmatch(own))
        for part in ("q", "k", "v", "kv")
    ]
    return {**dict(joined), **dict(apart), **found}


@cache
def _table() -> tuple[tuple[Dialect, ...], tuple[Dialect, ...]]:
    loaded = read_yaml(TABLE)
    assert isinstance(loaded, dict)
    return tuple(map(_dialect, loaded["dialects"])), tuple(map(_dialect, loaded["targets"]))


def _dialect(given: dict[str, Any]) -> Dialect:
    try:
        rules = tuple((re.compile(pattern), replacement) for pattern, replacement in _flat(given["rules"]))
        for pattern, replacement in rules:
            pattern.sub(replacement, "")  # a group that the pattern does not have
        return Dialect(given["name"], _patterns(given["when"]), rules, _patterns(given.get("aside", [])))
    except (re.error, ValueError, KeyError) as error:
        raise UserError(f"{TABLE}: {given.get('name')}: {'no ' if isinstance(error, KeyError) else ''}{error}") from error


def _patterns(given: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(map(re.compile, given))


def _flat(rules: Sequence[Any]) -> Iterator[Sequence[str]]:
    """Lists of rules that several dialects share stand in each as a whole."""
    for rule in rules:
        if isinstance(rule[0], str):
            yield rule
        else:
            yield from rule
