"""Why a transfer is refused, and what to do about it: advice is given only where planning again with it shows that it helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Advice:
    """`options` of the transfer to set, or the `line` of a map to write. `lead`: in which case that is right."""

    lead: str
    options: Mapping[str, Any] = field(default_factory=dict)
    line: str | None = None


@dataclass(frozen=True)
class Refusal:
    """`undecided`: about layers that could be paired in more than one way."""

    reason: str
    advice: tuple[Advice, ...] = ()
    undecided: bool = False


@dataclass(frozen=True)
class Attempt:
    """A plan made with other options. `pairs`: target -> source; none where the whole is refused."""

    refusals: tuple[Refusal, ...]
    pairs: Mapping[str, str | tuple[str, ...]]


Again = Callable[[Mapping[str, Any], Mapping[str, Any]], Attempt]
"""Plans again with these options and these lines of a map."""
_MOST_STEPS = 3


def message(refusal: Refusal, again: Again) -> str:
    """The reason, and what of its advice is true: options that make the plan go through, else a line that decides its own layer."""
    tried = [(each, _complete(each, again)) for each in refusal.advice]
    whole = [(each, options) for each, options in tried if options is not None]
    partly: list[tuple[Advice, dict[str, Any]]] = [] if whole else [(each, {}) for each, _ in tried if each.line is not None and _decides(each.line, again)]
    sentences = [_sentence(each, options) for each, options in whole if each.line is None]
    lines = [pair for pair in whole or partly if pair[0].line is not None]
    if len(lines) == 1:  # of several that fit none is recommended; and nothing stands behind a line that is to be copied
        sentences.append(_sentence(*lines[0]))
    return ". ".join([refusal.reason, *sentences])


def _complete(advice: Advice, again: Again) -> dict[str, Any] | None:
    """The options with which nothing is refused any more: those of the advice, and those that the next refusals ask for."""
    options, lines = dict(advice.options), _read(advice.line)
    for _ in range(_MOST_STEPS):
        attempt = again(options, lines)
        if not attempt.refusals:
            return options
        following = next((each for each in attempt.refusals[0].advice if each.line is None), None)
        if lines or following is None or all(options.get(name) == value for name, value in following.options.items()):
            return None
        options |= following.options
    return None


def _decides(line: str, again: Again) -> bool:
    ((target, rule),) = _read(line).items()
    source = rule["source"] if isinstance(rule, Mapping) else rule
    return again({}, {target: rule}).pairs.get(target) == (tuple(source) if isinstance(source, list) else source)


def _read(line: str | None) -> dict[str, Any]:
    return yaml.safe_load(line) if line else {}


def _sentence(advice: Advice, options: Mapping[str, Any]) -> str:
    chosen = f"set {', '.join(f'{name}: {_as_yaml(value)}' for name, value in options.items())}" if options else ""
    line = f"write into a map: {advice.line}" if advice.line else ""
    return f"{advice.lead}, {' and '.join(filter(None, (chosen, line)))}"


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(repr, value))}]"
    return str(value)


def under(share: float, least: float) -> tuple[str, str]:
    """Two percentages, of which the first is smaller, with as many digits as show it: ("59.7%", "60.0%"), not ("60%", "60%")."""
    for digits in range(8):
        shown, bound = f"{share:.{digits}%}", f"{least:.{digits}%}"
        if shown != bound:
            return shown, bound
    return shown, bound
