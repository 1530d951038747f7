"""Layers that a transfer leaves random: whether loaded ones stand behind them, and the patterns that name them (`transfer.fresh`)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from dtl.checkpoint.transfer.advice import Advice, Refusal
from dtl.checkpoint.transfer.layers.dataflow import Target, producers
from dtl.checkpoint.transfer.layers.layer import Layer
from dtl.errors import UserError
from dtl.text import counted


def may_be_new(patterns: Sequence[str], names: Sequence[str]) -> frozenset[str]:
    """Those of the network's names that a pattern of the option `fresh` allows to stay random. UserError on a pattern without a hit."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"fresh: {pattern} matches no tensor of this network (its names look like {', '.join(names[:3])} ...)")
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def loaded_behind(target: Target, random: Sequence[Layer], loaded: Collection[int]) -> dict[int, int]:
    """Random layer -> the nearest loaded layer that sees its output; those without one are left out.

    By the dataflow of a run on the meta device. Where the network cannot run there, by the order of registration.
    """
    flow = target.dataflow
    if flow is None:
        return {layer.index: min(later) for layer in random if (later := [index for index in loaded if index > layer.index])}
    _, after = producers(target.layers, flow)
    found = {layer.index: _nearest(layer.index, after, loaded) for layer in random}
    return {index: nearest for index, nearest in found.items() if nearest is not None}


def _nearest(start: int, after: Mapping[int, set[int]], wanted: Collection[int]) -> int | None:
    seen, queue = {start}, deque([start])
    while queue:
        for index in sorted(after.get(queue.popleft(), ())):
            if index in wanted:
                return index
            if index not in seen:
                seen.add(index)
                queue.append(index)
    return None


def as_patterns(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Few patterns that match all of `names` and no other of `every`: whole modules (`blocks.3.*`), and numbers as `*` where all of a list are meant."""
    wanted, others = set(names), [name for name in every if name not in set(names)]
    modules = {prefix for name in others for prefix in _modules(name)}
    whole = [next((f"{prefix}.*" for prefix in _modules(name) if prefix not in modules), name) for name in every if name in wanted]
    single = list(dict.fromkeys(whole))
    forms: dict[str, list[str]] = {}
    for pattern in single:
        forms.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", pattern), []).append(pattern)
    found: list[str] = []
    for form, patterns in forms.items():
        found += [form] if len(patterns) > 1 and not any(fnmatchcase(name, form) for name in others) else patterns
    return found


def _modules(name: str) -> list[str]:
    """The modules around a tensor, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


_MOST_SHOWN = 8


def random_and_followed(names: Sequence[str], every: Sequence[str], example: str, given: Sequence[str]) -> Refusal:
    """The refusal of a transfer that would leave `names` random in front of loaded layers. `given`: the patterns that `fresh` holds already."""
    patterns = as_patterns(names, every)
    reason = f"besides the head {counted(len(names), 'tensor')} would stay random, and loaded layers follow: {_some(patterns)} ({example})"
    return Refusal(reason, (Advice("If they are new on purpose", {"fresh": [*given, *patterns]}),))


def stay_random(names: Sequence[str], every: Sequence[str]) -> str:
    verb = "stays" if len(names) == 1 else "stay"
    return f"besides the head {counted(len(names), 'tensor')} {verb} random (at initial values): {_some(as_patterns(names, every))}"


def are_dropped(names: Sequence[str], every: Sequence[str]) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"{counted(len(names), 'tensor')} of the source {verb} dropped, for which this network has no place: {_some(as_patterns(names, every))}"


def _some(patterns: Sequence[str]) -> str:
    more = len(patterns) - _MOST_SHOWN
    return ", ".join(patterns[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
