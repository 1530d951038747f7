"""Maps: rules, written by hand or saved from a plan, that say which source tensor goes where.

    conv1.weight: stem.conv.weight                              # target: source, exact names
    layer{s}.{b}.conv{n}.weight: stage{s}.{b}.c{n}.weight       # {word} stands for any text without a dot
    "*": backbone.*                                             # * stands for any text
    re:layer(\\d)\\.(.*): stage\\1.\\2                             # a regular expression and its template
    attn.qkv.weight: [q.weight, k.weight, v.weight]             # several sources, joined
    gamma: {source: ls.gamma, transform: squeeze}               # a named transform where shapes differ

Every rule must hit, no target may be named twice, no source may serve two targets unless it says `shared: true`.
Where only the other direction (source: target) fits, it is understood so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.checkpoint.adapt import TRANSFORMS, is_transform
from dtl.checkpoint.matching import Clash, Match, Matching
from dtl.checkpoint.units import Entry, Key
from dtl.errors import UserError

if TYPE_CHECKING:
    from dtl.checkpoint.plan import TransferPlan

_WILD = re.compile(r"\{(\w+)\}|\*")


@dataclass(frozen=True)
class Rule:
    """`left` is matched against names of one side, `right` (templates) gives names of the other."""

    left: str
    right: tuple[str, ...]
    transform: str = ""
    shared: bool = False

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
    path = Path(mapping)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"map {path}: not readable ({error.strerror})") from error
    try:
        if path.suffix == ".json":
            loaded = json.loads(text)
        else:
            import yaml

            loaded = yaml.safe_load(text)
    except Exception as error:  # both parsers raise their own kinds
        raise UserError(f"map {path}: not readable as {'JSON' if path.suffix == '.json' else 'YAML'} ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"map {path}: expected lines of `target: source`, found {type(loaded).__name__}")
    return _rules(loaded, f"map {path}")


def _rules(loaded: Mapping[str, Any], where: str) -> list[Rule]:
    rules = []
    for left, value in loaded.items():
        options: Mapping[str, Any] = value if isinstance(value, Mapping) else {"source": value}
        unknown = sorted(set(options) - {"source", "transform", "shared"})
        sources = options.get("source")
        if unknown or sources is None:
            raise UserError(f"{where}: {left}: expected a source, or source, transform and shared; found {dict(options)}")
        names = tuple(map(str, sources)) if isinstance(sources, (list, tuple)) else (str(sources),)
        transform = str(options.get("transform") or ("fuse" if len(names) > 1 else ""))
        if not is_transform(transform):
            raise UserError(f"{where}: {left}: no transform called {transform}; known are {', '.join(TRANSFORMS)}")
        rules.append(Rule(str(left), names, transform, bool(options.get("shared", False))))
    return rules


def match_map(rules: list[Rule], source: list[Entry], target: list[Entry]) -> Matching:
    """Pairs by rules alone; every mistake in them is a refusal that names the rule."""
    matching = Matching("map")
    ours, theirs = {e.name: e for e in source}, {e.name: e for e in target}
    hits, missed = _expand(rules, theirs, ours, lambda left, right: _Hit(left, right[0], right[1]))
    if missed:
        turned, missed_turned = _expand(rules, ours, theirs, lambda left, right: _Hit(right[0][0], (left,), right[1]))
        if not missed_turned:
            hits, missed = turned, []
            matching.notes.append("the map was read as source: target")
    matching.refusals += missed
    _check_uniqueness(matching, hits)
    for hit in hits:
        shape, wanted = ours[hit.sources[0]].shape, theirs[hit.target].shape
        if not hit.rule.transform and shape != wanted:
            matching.clashes.append(Clash(hit.target, wanted, hit.sources[0], shape))
            matching.refusals.append(f"map rule {hit.rule.left}: shapes differ and no transform is named: {matching.clashes[-1]}")
        key: Key = hit.sources if len(hit.sources) > 1 else hit.sources[0]
        matching.matches[hit.target] = Match(key, hit.rule.transform, "map")
    return matching


def _expand(
    rules: list[Rule],
    left_side: Mapping[str, Entry],
    right_side: Mapping[str, Entry],
    hit: Callable[[str, tuple[tuple[str, ...], Rule]], _Hit],
) -> tuple[list[_Hit], list[str]]:
    """All pairs that the rules make, and what is wrong with those that make none. Exact rules go before patterns."""
    hits: list[_Hit] = []
    missed = []
    exact = {rule.left for rule in rules if not rule.is_pattern}
    for rule in rules:
        made = 0
        problem = "matches no name"
        for name, groups in _matches(rule, left_side):
            if rule.is_pattern and name in exact:
                made += 1
                continue
            names = tuple(_fill(template, groups, rule) for template in rule.right)
            lacking = [other for other in names if other not in right_side]
            if lacking:
                problem = f"asks for {lacking[0]}, which the other side does not have"
                if rule.is_pattern:
                    continue
                break
            hits.append(hit(name, (names, rule)))
            made += 1
        if not made:
            missed.append(f"map rule {rule.left}: {' + '.join(rule.right)} {problem}")
    return hits, missed


def _matches(rule: Rule, names: Mapping[str, Entry]) -> list[tuple[str, re.Match[str] | None]]:
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
            raise UserError(f"map rule {rule.left}: {{{word}}} stands on the right only")
        return named[f"w_{word}"] if word is not None else next(stars, "")

    return _WILD.sub(value, template)


def _check_uniqueness(matching: Matching, hits: list[_Hit]) -> None:
    by_target: dict[str, _Hit] = {}
    by_source: dict[str, _Hit] = {}
    for hit in hits:
        other = by_target.setdefault(hit.target, hit)
        if other is not hit and (other.sources != hit.sources or other.rule.transform != hit.rule.transform):
            matching.refusals.append(f"map: {hit.target} is named twice, for {' + '.join(other.sources)} and {' + '.join(hit.sources)}")
        if hit.rule.shared or hit.rule.transform.startswith("split_"):
            continue
        for name in hit.sources:
            first = by_source.setdefault(name, hit)
            if first.target != hit.target:
                matching.refusals.append(f"map: {name} would go to both {first.target} and {hit.target} (shared: true allows it)")


def save_map(plan: TransferPlan, path: str | Path) -> None:
    """Write what a plan would load as a map, and what it could not decide as comments with the lines that settle it."""
    import yaml

    path = Path(path)
    rules: dict[str, Any] = {}
    for outcome in plan.outcomes:
        if outcome.target and outcome.source and outcome.outcome in ("loaded", "adapted"):
            source = list(outcome.source) if isinstance(outcome.source, tuple) else outcome.source
            plain = outcome.transform in ("", "fuse" if isinstance(source, list) else "")
            rules[outcome.target] = source if plain else {"source": source, "transform": outcome.transform}
    if path.suffix == ".json":
        path.write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")
        return
    lines = ["# target: source. Edit, then feed back with --by map --map THIS_FILE.\n"]
    for target, alternatives in plan.flagged.items():
        lines += [f"# undecided: {target}: {name}\n" for name in alternatives[:6]]
    body = yaml.safe_dump(rules, sort_keys=False, width=2**20, default_flow_style=False) if rules else ""  # a pair a line: people edit it
    path.write_text("".join(lines) + body, encoding="utf-8")
