"""Maps: rules, written by hand or saved from a plan, that define which source tensor goes where.

    conv1.weight: stem.conv.weight                              # target: source, exact names
    layer{s}.{b}.conv{n}.weight: stage{s}.{b}.c{n}.weight       # {word} stands for any text without a dot
    "*": backbone.*                                             # * stands for any text
    re:layer(\\d)\\.(.*): stage\\1.\\2                             # a regular expression and its template
    attn.qkv.weight: [q.weight, k.weight, v.weight]             # several sources, joined
    gamma: {source: ls.gamma, transform: squeeze}               # a named transform where shapes differ
    fc.weight: {source: fc.weight, transform: rows, rows: [7, [2, 5]]}   # row 7, and the mean of rows 2 and 5

Every rule must hit, no target may be named twice, no source may serve two targets unless it has `shared: true` (the parts of a
fused projection, and the weight and the bias that a norm is folded into, share theirs anyway).
Where only the other direction (source: target) fits, it is understood so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtl.checkpoint.transfer.adapt import TRANSFORMS, is_transform, why_not
from dtl.checkpoint.transfer.layers.layer import TensorSpec
from dtl.checkpoint.transfer.match.evidence import Clash, Match, Matching
from dtl.errors import UserError
from dtl.files import user_path
from dtl.untrusted import read_json, read_yaml

_WILD = re.compile(r"\{(\w+)\}|\*")


@dataclass(frozen=True)
class Rule:
    """`left` is matched against names of one side, `right` (templates) gives names of the other."""

    left: str
    right: tuple[str, ...]
    transform: str = ""
    shared: bool = False
    rows: tuple[tuple[int, ...], ...] | None = None
    """For `transform: rows`: per class of the target the rows of the source's head whose mean becomes its row."""

    @property
    def is_pattern(self) -> bool:
        return self.left.startswith("re:") or _WILD.search(self.left) is not None


@dataclass(frozen=True)
class _Hit:
    target: str
    sources: tuple[str, ...]
    rule: Rule


def read_rules(mapping: str | Path | Mapping[str, Any]) -> list[Rule]:
    """Rules from a YAML or JSON file, or a dict. UserError with the place of the mistake."""
    if isinstance(mapping, Mapping):
        return _rules(mapping, "the map")
    path = user_path(mapping)
    try:
        loaded = read_json(path, by_hand=True) if path.suffix == ".json" else read_yaml(path)
    except OSError as error:
        raise UserError(f"map {path}: not readable ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"map {error}") from error
    if not isinstance(loaded, Mapping) or not loaded:
        none = "; its lines are comments: take the # from those that are right" if loaded is None else f", found {type(loaded).__name__}"
        raise UserError(f"map {path}: expected lines of `target: source`{none}")
    return _rules(loaded, f"map {path}")


def _rules(loaded: Mapping[str, Any], where: str) -> list[Rule]:
    rules = []
    for left, value in loaded.items():
        options: Mapping[str, Any] = value if isinstance(value, Mapping) else {"source": value}
        unknown = sorted(set(options) - {"source", "transform", "shared", "rows"})
        sources = options.get("source")
        if unknown or sources is None:
            raise UserError(f"{where}: {left}: expected a source, or a dict with source, transform, shared and rows; found {dict(options)}")
        names = tuple(map(str, sources)) if isinstance(sources, (list, tuple)) else (str(sources),)
        transform = str(options.get("transform") or ("fuse" if len(names) > 1 else ""))
        if not is_transform(transform):
            raise UserError(f"{where}: {left}: unknown transform {transform}; known transforms are {', '.join(TRANSFORMS)}")
        rows = _rows(options.get("rows"), f"{where}: {left}")
        if (rows is not None) != (transform == "rows"):
            raise UserError(f"{where}: {left}: `transform: rows` needs a list `rows`, and `rows` needs `transform: rows`")
        rules.append(Rule(str(left), names, transform, bool(options.get("shared", False)), rows))
    return rules


def _rows(given: Any, where: str) -> tuple[tuple[int, ...], ...] | None:
    """[3, [0, 1]] as ((3,), (0, 1))."""
    if given is None:
        return None
    rows = [pick if isinstance(pick, (list, tuple)) else [pick] for pick in given] if isinstance(given, (list, tuple)) else []
    if not rows or not all(pick and all(isinstance(row, int) and not isinstance(row, bool) for row in pick) for pick in rows):
        raise UserError(f"{where}: rows must be a list with one number, or one list of numbers, per class; found {given!r}")
    return tuple(tuple(pick) for pick in rows)


def match_map(rules: list[Rule], source: list[TensorSpec], target: list[TensorSpec]) -> Matching:
    """Pairs by rules alone; every mistake in them is a refusal that names the rule."""
    matching = Matching("map")
    ours, theirs = {e.name: e for e in source}, {e.name: e for e in target}
    hits, missed = _expand(rules, theirs, ours, lambda left, right: _Hit(left, right[0], right[1]))
    if missed:
        turned, missed_turned = _expand(rules, ours, theirs, lambda left, right: _Hit(right[0][0], (left,), right[1]))
        if not missed_turned:
            hits, missed = turned, []
            matching.notes.append("the lines of the map were read as `source: target`")
    matching.refusals += missed
    _check_uniqueness(matching, hits)
    matching.head_rows = _agreed_rows(matching, hits)
    for hit in hits:
        shapes, wanted = [ours[name].shape for name in hit.sources], theirs[hit.target].shape
        if not hit.rule.transform:
            problem = "the shapes differ, and the rule has no transform" if shapes[0] != wanted else None
        else:
            why = why_not(hit.rule.transform, shapes, wanted, picks=hit.rule.rows)
            problem = f"{hit.rule.transform} {why}" if why else None
        if problem:
            matching.clashes.append(Clash(hit.target, wanted, hit.sources[0], shapes[0]))
            matching.refusals.append(f"map rule {hit.rule.left}: {problem}: {matching.clashes[-1]}")
        matching.matches[hit.target] = Match(hit.sources, hit.rule.transform, "map")
    return matching


def _expand(
    rules: list[Rule],
    left_side: Mapping[str, TensorSpec],
    right_side: Mapping[str, TensorSpec],
    hit: Callable[[str, tuple[tuple[str, ...], Rule]], _Hit],
) -> tuple[list[_Hit], list[str]]:
    """All pairs that the rules make, and what is wrong with those that make none. Exact rules go before patterns."""
    hits: list[_Hit] = []
    missed = []
    exact = {rule.left for rule in rules if not rule.is_pattern}
    for rule in rules:
        made = 0
        problem = "matches no tensor of this network"
        for name, groups in _matches(rule, left_side):
            if rule.is_pattern and name in exact:
                made += 1
                continue
            names = tuple(_fill(template, groups, rule) for template in rule.right)
            lacking = [other for other in names if other not in right_side]
            if lacking:
                problem = f"needs {lacking[0]}, which the source does not have"
                if rule.is_pattern:
                    continue
                break
            hits.append(hit(name, (names, rule)))
            made += 1
        if not made:
            missed.append(f"map rule {rule.left}: {' + '.join(rule.right)}: {problem}")
    return hits, missed


def _matches(rule: Rule, names: Mapping[str, TensorSpec]) -> list[tuple[str, re.Match[str] | None]]:
    if not rule.is_pattern:
        return [(rule.left, None)] if rule.left in names else []
    try:
        pattern = re.compile(rule.left[3:] if rule.left.startswith("re:") else _as_expression(rule.left))
    except re.error as error:
        raise UserError(f"map rule {rule.left}: not a regular expression ({error})") from error
    return [(name, found) for name in names if (found := pattern.fullmatch(name))]


def _as_expression(pattern: str) -> str:
    parts, end, seen = [], 0, set()
    for wild in _WILD.finditer(pattern):
        parts.append(re.escape(pattern[end : wild.start()]))
        word = wild.group(1)
        if word is None:
            parts.append("(.*)")
        elif word in seen:
            parts.append(f"(?P=w_{word})")
        else:
            seen.add(word)
            parts.append(f"(?P<w_{word}>[^.]+)")
        end = wild.end()
    return "".join(parts) + re.escape(pattern[end:])


def _fill(template: str, groups: re.Match[str] | None, rule: Rule) -> str:
    if groups is None:
        return template
    if rule.left.startswith("re:"):
        return groups.expand(template)
    named = groups.groupdict()
    stars = iter([value for n, value in enumerate(groups.groups(), 1) if n not in groups.re.groupindex.values()])

    def value(wild: re.Match[str]) -> str:
        word = wild.group(1)
        if word is not None and f"w_{word}" not in named:
            raise UserError(f"map rule {rule.left}: {{{word}}} appears on the right side only")
        return named[f"w_{word}"] if word is not None else next(stars, "")

    return _WILD.sub(value, template)


def _agreed_rows(matching: Matching, hits: list[_Hit]) -> tuple[tuple[int, ...], ...] | None:
    """The rows of the head: one choice for its weight and its bias."""
    chosen = {hit.rule.rows: hit for hit in hits if hit.rule.rows is not None}
    if len(chosen) > 1:
        matching.refusals.append(f"map: {' and '.join(hit.target for hit in chosen.values())} choose different rows of the head")
    return next(iter(chosen), None)


def _check_uniqueness(matching: Matching, hits: list[_Hit]) -> None:
    by_target: dict[str, _Hit] = {}
    by_source: dict[str, list[_Hit]] = {}
    for hit in hits:
        other = by_target.setdefault(hit.target, hit)
        if other is not hit and (other.sources != hit.sources or other.rule.transform != hit.rule.transform):
            matching.refusals.append(f"map: {hit.target} has two rules, with the sources {' + '.join(other.sources)} and {' + '.join(hit.sources)}")
        for name in hit.sources:
            by_source.setdefault(name, []).append(hit)
    for name, takers in by_source.items():
        first, *others = takers
        both = [each for each in others if each.target != first.target and not _may_share(first, each)]
        if both:
            matching.refusals.append(f"map: {name} would be loaded into both {first.target} and {both[0].target} (shared: true allows it)")


def _may_share(first: _Hit, other: _Hit) -> bool:
    """Different parts of one projection; weight and bias of one folding; a class token its row of the table; what the map marks as shared."""
    kinds = first.rule.transform, other.rule.transform
    parts = any(all(kind.startswith(family) for kind in kinds) for family in ("split_", "fold_norm_"))
    token = kinds[0] != kinds[1] and "add_position" in kinds
    return first.rule.shared or other.rule.shared or token or (parts and kinds[0] != kinds[1] and first.sources == other.sources)
