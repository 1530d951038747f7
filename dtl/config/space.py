"""The space of a search: ranges of config keys in a YAML file, and the trials that are drawn from it.

    phases.head.lr: {log: [0.001, 0.3]}            uniform in the logarithm
    phases.all.layer_decay: {uniform: [0.5, 1.0]}
    phases.head.epochs: {integers: [5, 20]}        log_integers: uniform in the logarithm
    model.name: [torchvision/resnet18, timm/convnext_tiny]
    model.name, transfer.source: [[torchvision/resnet18, pretrained], [timm/vit_small, vit.pt]]     keys that belong together

Trial 1 is the recipe as it is. The settings of the others are functions of the seed and a number (`dtl.keyed`): more trials begin with the same ones. No two
are the same, so that a space of choices is gone through without a repetition. No torch in here.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, count, islice
from typing import Any

import yaml

from dtl.config.load import read_value_as, resolve_config
from dtl.config.models import Config, PhaseConfig, flat
from dtl.errors import UserError
from dtl.files import user_path
from dtl.keyed import uniform
from dtl.text import nearest
from dtl.untrusted import MAX_YAML_BYTES, parse_yaml, read_text

_DIGITS = 4
"""Significant ones of a drawn number, so that a command line can repeat it."""
_MOST_REPEATED = 10_000
_KINDS = ("uniform", "log", "integers", "log_integers")
MOST_TRIALS = 1000
# What trials are compared by, and where they are, is the same for all.
_FIXED = ("run.name", "run.dir", "run.resume", "run.debug", "data.val", "data.val_fraction", "data.test", "data.test_fraction", "data.fold", "data.group",
          "data.group_check", "data.audit", "checkpoint.monitor")  # fmt: skip
Settings = dict[str, Any]
"""Of a trial, by dotted keys."""
Resolve = Callable[[Mapping[str, Any]], Config]
"""The config of the recipe with options on top of it."""


@dataclass(frozen=True)
class Range:
    """What the values of one key, or of several that belong together, are drawn from."""

    keys: tuple[str, ...]
    kind: str
    """choices, or one of `_KINDS`."""
    values: tuple[Any, ...]
    """The choices, each a tuple with a value for each key; or the lowest and the highest value."""

    @property
    def name(self) -> str:
        return ", ".join(self.keys)

    @property
    def num_values(self) -> int | None:
        """None: as good as infinitely many."""
        if self.kind == "choices":
            return len(self.values)
        return int(self.values[1] - self.values[0]) + 1 if "integers" in self.kind else None

    def at(self, share: float) -> Settings:
        """Its value at a place from 0 to 1."""
        if self.kind == "choices":
            return dict(zip(self.keys, self.values[min(int(share * len(self.values)), len(self.values) - 1)]))
        low, high = self.values
        if "integers" in self.kind:  # each of them has its share
            low, high = low - 0.5, high + 0.5
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if "log" in self.kind else low + share * (high - low)
        if "integers" in self.kind:
            return {self.keys[0]: min(max(round(value), self.values[0]), self.values[1])}
        return {self.keys[0]: float(f"{value:.{_DIGITS}g}")}

    def examples(self) -> Iterator[Settings]:
        """Each choice; of numbers the ends."""
        yield from ([dict(zip(self.keys, value)) for value in self.values] if self.kind == "choices" else [{self.keys[0]: value} for value in self.values])


@dataclass(frozen=True)
class Space:
    """The ranges of a file, or rows of settings that are tried in their order."""

    origin: str
    ranges: tuple[Range, ...]
    rows: tuple[Settings, ...] = ()

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys([key for one in self.ranges for key in one.keys] + [key for row in self.rows for key in row]))

    @property
    def size(self) -> int | None:
        """Of how many different settings it consists; None: as good as infinitely many."""
        numbers = [one.num_values for one in self.ranges]
        return None if None in numbers else math.prod(number or 0 for number in numbers)

    def describe(self) -> dict[str, Any]:
        """As plain values: what tells one space from another."""
        ranges = {one.name: {one.kind: [list(value) if one.kind == "choices" else value for value in one.values]} for one in self.ranges}
        return {**ranges, **({"candidates": [dict(row) for row in self.rows]} if self.rows else {})}

    def trials(self, seed: int, resolve: Resolve) -> Iterator[tuple[Settings, Config]]:
        """The settings of trial 1, 2, ... and their configs, until there are no others. UserError for settings that do not go together."""
        seen = set[str]()
        for settings in chain([{}], self.rows, self._drawn(seed)):
            try:
                config = resolve(settings)
            except UserError as error:
                raise UserError(f"{self.origin}: {described(settings)}: {error}") from error
            if (identity := _identity(config)) not in seen:
                seen.add(identity)
                yield settings, config

    def _drawn(self, seed: int) -> Iterator[Settings]:
        """From the ranges, no two of them the same."""
        found, size, last = set[str](), self.size if self.ranges else 0, 0
        for number in count():
            if len(found) == size or number - last > _MOST_REPEATED:  # of numbers that differ in no digit that is written
                return
            settings: Settings = {}
            for one in self.ranges:
                settings |= one.at(float(uniform([number], seed, "search", one.name)[0]))
            if (text := repr(sorted(settings.items()))) not in found:
                found.add(text)
                last = number
                yield settings

    def first(self, number: int, seed: int, resolve: Resolve) -> list[tuple[Settings, Config]]:
        return list(islice(self.trials(seed, resolve), number))

    def check(self, resolve: Resolve) -> None:
        """UserError for a key that does not exist, or a value that it does not take."""
        for one in self.ranges:
            for settings in one.examples():
                try:
                    resolve(settings)
                except UserError as error:
                    text = re.sub("^.* with (?=--)", "", str(error))
                    for key in settings:  # which the error names as an option, and which stands in the file here
                        text = text.replace(f"--{key}", key).replace(f"--{key.replace('-', '_')}", key)
                    raise UserError(f"{self.origin}: {text}") from error


# Of the last phase that is trained by steps: what its learning rate and its duration are multiplied with. Too low and too high a rate cost more than anything
# else, and of few images more epochs are cheap; so these come first.
_CANDIDATES = ((3, 1), (1 / 3, 1), (1, 2), (3, 2), (10, 1), (1 / 3, 2), (1 / 10, 1), (1, 4))


def candidates(config: Config) -> Space:
    """Good first candidates for any recipe, in the order in which they are tried: the space of `dtl train --budget`."""
    name = next((name for name in reversed(config.phases) if _by_steps(config.phases[name])), None)
    if name is None:
        raise UserError(
            "every phase is solved, so its settings are found already: --config finetune trains the whole network, whose settings can be searched; "
            "`dtl search --space FILE` with `model.name: [NAME, NAME]` in FILE compares networks"
        )
    phase, rows = config.phases[name], list[Settings]()
    duration, length = ("steps", phase.steps) if phase.steps is not None else ("epochs", phase.epochs or 1)
    for rate, longer in _CANDIDATES:
        row: Settings = {} if rate == 1 else {f"phases.{name}.lr": float(f"{phase.lr * rate:.{_DIGITS}g}")}
        whole = length * longer
        rows.append(row if longer == 1 else {**row, f"phases.{name}.{duration}": int(whole) if whole == int(whole) else whole})
    return Space("the built-in candidates", (), tuple(rows))


def _by_steps(phase: PhaseConfig) -> bool:
    return str(phase.optimizer) != "solve"


def resolver(recipe: str | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Resolve:
    """Of a recipe and the options of a command line."""
    return lambda settings: resolve_config(recipe, {**options, **settings})[0]


def described(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "the recipe as it is"


def read_space(file: str) -> Space:
    """UserError for a file that cannot be read or is no space."""
    path = user_path(file)
    try:
        text = read_text(path, max_bytes=MAX_YAML_BYTES)
    except OSError as error:
        raise UserError(f"--space {file}: cannot be read: {error.strerror or error}") from error
    values = parse_yaml(text, str(path), prepare=_read_as_settings)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: a space is a mapping of config keys to ranges, such as `phases.head.lr: {{log: [0.001, 0.1]}}`")
    ranges = tuple(_range(str(path), str(name), value) for name, value in values.items())
    space = Space(str(path), ranges)
    keys = [key for one in ranges for key in one.keys]
    for first, second in combinations(keys, 2):
        one, other = (key.replace("-", "_") for key in (first, second))
        if one == other:
            raise UserError(f"{path}: {second} has two ranges")
        if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."):
            raise UserError(f"{path}: {first} and {second} set the same; give a range to one of them")
    return space


def _read_as_settings(root: yaml.Node) -> None:
    """Values are read as the recipe would read them: `[no, 4711]` of a setting that takes text is text, and 1e-4 a number."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        names = _names(key.value) if isinstance(key, yaml.ScalarNode) else []
        lists = [ends for _, ends in value.value] if isinstance(value, yaml.MappingNode) else [value]  # {log: [1e-4, 1e-2]}, or choices
        for one in [one for values in lists if isinstance(values, yaml.SequenceNode) for one in values.value]:
            together = one.value if len(names) > 1 and isinstance(one, yaml.SequenceNode) else [one]
            for name, node in zip(names, together):
                read_value_as(node, name)


def _inner(key: str, value: Any) -> list[str]:
    """The keys that a choice sets below `key`: data.val of {val: photos}."""
    if not isinstance(value, dict):
        return []
    return [name for inner, below in value.items() for name in (f"{key}.{inner}", *_inner(f"{key}.{inner}", below))]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _range(origin: str, name: str, value: Any) -> Range:
    keys = tuple(_names(name))
    choices = value.get("choices") if isinstance(value, dict) else value
    given = list(keys)
    for choice in choices if isinstance(choices, list) else ():
        for key, one in zip(keys, choice if len(keys) > 1 and isinstance(choice, list) else [choice]):
            given += _inner(key, one)
    for key in given:
        if fixed := next((one for one in _FIXED if key.replace("-", "_") == one or key.replace("-", "_").startswith(f"{one}.")), None):
            raise UserError(f"{origin}: {key}: {fixed} is the same for all trials of a search, which are compared with each other; set it as an option")
    if isinstance(value, list):
        return _choices(origin, keys, value)
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(f"{origin}: {name}: a range is a list of choices, or one of {', '.join(_KINDS)} with [lowest, highest], such as {{log: [0.001, 0.1]}}")
    [(kind, ends)] = value.items()
    if kind == "choices" and isinstance(ends, list):
        return _choices(origin, keys, ends)
    if kind == "choices":
        raise UserError(f"{origin}: {name}: choices takes a list (got {ends!r})")
    if kind not in _KINDS:
        raise UserError(f"{origin}: {name}: unknown kind of range {kind!r}{nearest(str(kind), _KINDS)}; there are {', '.join(_KINDS)}, and lists of choices")
    if len(keys) > 1:
        raise UserError(f"{origin}: {name}: several keys have choices, with a value for each key")
    ends = [_as_number(end) for end in ends] if isinstance(ends, list) else ends
    numbers = int if "integers" in kind else int | float
    if not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, numbers) and not isinstance(end, bool) for end in ends) and ends[0] < ends[1]):
        what = "whole numbers" if "integers" in kind else "numbers"
        raise UserError(f"{origin}: {name}: {kind} takes [lowest, highest], two {what} (got {ends!r})")
    if "log" in kind and ends[0] <= 0:
        raise UserError(f"{origin}: {name}: {kind} takes numbers above 0 (got {ends[0]!r})")
    return Range(keys, kind, tuple(ends))


def _as_number(end: Any) -> Any:
    """1e-4, which YAML 1.1 reads as text."""
    with contextlib.suppress(ValueError):
        return float(end) if isinstance(end, str) and math.isfinite(float(end)) else end
    return end


def _choices(origin: str, keys: tuple[str, ...], values: list[Any]) -> Range:
    if not values:
        raise UserError(f"{origin}: {', '.join(keys)}: a list of choices needs at least one")
    if len(keys) == 1:
        return Range(keys, "choices", tuple((value,) for value in values))
    for value in values:
        if not isinstance(value, list) or len(value) != len(keys):
            raise UserError(f"{origin}: {', '.join(keys)}: each choice is a list with a value for each of the {len(keys)} keys (got {value!r})")
    return Range(keys, "choices", tuple(tuple(value) for value in values))


def _identity(config: Config) -> str:
    return repr(sorted(flat(config.to_dict()).items()))
