"""Weight transfer on more than a hundred pairs of networks with known truth, against what people use today.

    python -m benchmarks.transfer [--out RESULTS] [--only TEXT] [--methods TEXT,TEXT] [--with RESULTS.json] [--show]

Compared: dtl's `auto` without and with `assume_order`, and with the source's network; the loop of the tutorials
(`if shapes are equal: i += 1`), a plain zip, equal names (`strict=False` without the clashes), and weightbridge if installed.
Counted are floating tensors: right pairs found of those in the truth, and false pairs. The last line says whether dtl made a
false assignment without being told to assume anything; the exit status is 1 if it did.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import measure
from benchmarks.transfer_adversaries import adversaries
from benchmarks.transfer_pairs import Pair, edits, families, tutorial
from dtl.checkpoint.transfer.plan import plan_transfer

Found = dict[str, Any]
LIMIT_SECONDS = 15  # of the clock, for a pair


class NothingLoadedError(Exception):
    """A method gave up; the text says how."""


def all_pairs() -> Iterator[Pair]:
    yield from edits()
    yield from tutorial()
    yield from adversaries()
    yield from families()


# --- methods ---


def dtl_auto(pair: Pair) -> Found:
    return plan_transfer(pair.source, pair.target).pairs


def dtl_assume_order(pair: Pair) -> Found:
    return plan_transfer(pair.source, pair.target, assume_order=True).pairs


def dtl_source_model(pair: Pair) -> Found:
    return plan_transfer(pair.source, pair.target, source_model=pair.source_model).pairs


def tutorial_loop(pair: Pair) -> Found:
    """Walk through the target; take the next source tensor whenever its shape fits."""
    source, found, at = list(pair.source.items()), {}, 0
    for name, value in pair.target.state_dict().items():
        if at < len(source) and source[at][1].shape == value.shape:
            found[name] = source[at][0]
            at += 1
    return found


def plain_zip(pair: Pair) -> Found:
    target = pair.target.state_dict()
    return {t: s for t, s in zip(target, pair.source) if target[t].shape == pair.source[s].shape}


def equal_names(pair: Pair) -> Found:
    return {t: t for t, v in pair.target.state_dict().items() if t in pair.source and pair.source[t].shape == v.shape}


def weightbridge(pair: Pair) -> Found:
    import weightbridge as wb

    names = list(pair.source)
    # Each tensor holds its own number, so that the result tells where it came from; broadcasts need no memory.
    ours = {name: np.broadcast_to(np.float64(n), tuple(pair.source[name].shape)) for n, name in enumerate(names)}
    theirs = {name: np.broadcast_to(np.float64(0), tuple(value.shape)) for name, value in pair.target.state_dict().items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()), time_limit(LIMIT_SECONDS):
            adapted = wb.adapt(ours, theirs)
    except Exception as error:  # it raises where it cannot pair everything
        raise NothingLoadedError(f"stopped after {LIMIT_SECONDS} s" if isinstance(error, TimeoutError) else type(error).__name__) from error
    return {name: names[int(value.flat[0])] for name, value in adapted.items() if value.size}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so long: hundreds of tensors without words take weightbridge many minutes."""

    def stop(_number: int, _frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


METHODS: dict[str, Callable[[Pair], Found]] = {
    "tutorial loop": tutorial_loop,
    "zip": plain_zip,
    "equal names": equal_names,
    "weightbridge": weightbridge,
    "dtl auto": dtl_auto,
    "dtl auto, assume_order": dtl_assume_order,
    "dtl auto, source_model": dtl_source_model,
}


@dataclass(frozen=True)
class Score:
    right: int
    of: int
    false: int
    seconds: float
    wrong: tuple[str, ...]
    failure: str = ""
    """Why nothing was loaded, where the method gave up."""


def score(pair: Pair, method: Callable[[Pair], Found]) -> Score:
    started = time.process_time()  # one thread: the machine may have other things to do
    found, failure = {}, ""
    try:
        found = method(pair)
    except NothingLoadedError as error:
        failure = str(error)
    seconds = time.process_time() - started
    target = pair.target.state_dict()
    floating = {t: s for t, s in found.items() if target[t].is_floating_point()}
    head = _head_names(pair.target)
    right = sum(pair.truth.get(t) == s for t, s in floating.items())
    wrong = [t for t, s in floating.items() if pair.truth.get(t) != s and not (t in head and t not in pair.truth)]
    return Score(right, len(pair.truth), len(wrong), seconds, tuple(wrong[:3]), failure)


def _head_names(target: nn.Module) -> set[str]:
    """A head of another task may be loaded by others by chance of equal shape; that is not counted."""
    from dtl.checkpoint.transfer.layers.layer import detect_heads, layers_of, specs_of

    return {name for unit in detect_heads(layers_of(specs_of(target.state_dict()))) for name in unit.names}


def available() -> list[str]:
    try:
        import weightbridge as _  # noqa: F401
    except ImportError:
        print("weightbridge is not installed (pip install weightbridge): left out")
        return [name for name in METHODS if name != "weightbridge"]
    return list(METHODS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write FILE.md and FILE.json; results kept in the repository lie in benchmarks/results")
    parser.add_argument("--only", default="", help="pairs whose name holds this text")
    parser.add_argument("--methods", default="", help="methods whose name holds one of these texts")
    parser.add_argument("--with", dest="earlier", type=Path, help="take the scores of the other methods from an earlier result")
    parser.add_argument("--show", action="store_true", help="one line a pair")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    facts = measure.machine()
    methods = [name for name in available() if any(text in name for text in options.methods.split(","))]
    scores: dict[str, dict[str, Score]] = _earlier(options.earlier, methods)
    groups: dict[str, str] = {}
    for pair in all_pairs():
        if options.only not in pair.name:
            continue
        groups[pair.name] = pair.group
        for method in methods:
            if method == "dtl auto, source_model" and pair.source_model is None:
                continue
            scores.setdefault(method, {})[pair.name] = score(pair, METHODS[method])
        if options.show:
            cells = [f"{scores[m][pair.name].right}/{len(pair.truth)}-{scores[m][pair.name].false}" for m in methods if pair.name in scores[m]]
            print(f"{pair.name:60s} " + "  ".join(cells), flush=True)
    scores = {method: scores[method] for method in METHODS if method in scores}
    false = _false_pairs(scores)
    lines = [*summary(scores, groups), "", *(false or ["No false assignment without assume_order."])]
    if "weightbridge" in scores:
        lines += ["", f"weightbridge {importlib.metadata.version('weightbridge')}: {_failures(scores['weightbridge'].values())}."]
    results = {method: {name: vars(each) for name, each in found.items()} for method, found in scores.items()}
    measure.report(f"Weight transfer: {len(groups)} pairs of networks", lines, results, facts, options.out)
    return 1 if false else 0


def _earlier(file: Path | None, measured_now: list[str]) -> dict[str, dict[str, Score]]:
    if file is None:
        return {}
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {m: {n: Score(**{**s, "wrong": tuple(s["wrong"])}) for n, s in found.items()} for m, found in results.items() if m not in measured_now}


def summary(scores: dict[str, dict[str, Score]], groups: dict[str, str]) -> list[str]:
    """Two tables: by group of pairs, and torchvision against timm by what became of the names."""
    names = list(dict.fromkeys(groups.values()))
    rows = []
    count = {group: sum(each == group for each in groups.values()) for group in names}
    for method, results in scores.items():
        cells = [_share([s for name, s in results.items() if groups.get(name) == group], count[group]) for group in names]
        seconds = [s.seconds for s in results.values()]
        rows.append([method, *cells, f"{statistics.median(seconds):.3f}", f"{max(seconds):.2f}"])
    lines = ["Right pairs found / false pairs (in how many pairs of networks), floating tensors.", ""]
    lines += measure.table(["method", *(f"{group} ({count[group]})" for group in names), "median CPU s", "most CPU s"], rows)
    between = [name for name, group in groups.items() if group == "torchvision <-> timm"]
    if between:
        namings = ("names kept", "sorted", "all hashed")
        named = [[name for name in between if name.endswith(words)] for words in namings]
        rows = [[m, *(_share([found[n] for n in pairs if n in found], len(pairs)) for pairs in named)] for m, found in scores.items()]
        lines += ["", "torchvision <-> timm:", "", *measure.table(["method", *namings], rows)]
    return lines


def _share(members: list[Score], num_pairs: int) -> str:
    """`num_pairs`: there are so many; not every method can be asked for each."""
    right, of, false = (sum(getattr(s, field) for s in members) for field in ("right", "of", "false"))
    asked = "" if len(members) == num_pairs else f", {len(members)} of {num_pairs} pairs"
    return f"{100 * right / max(1, of):.1f} % of {of} / {false} ({sum(s.false > 0 for s in members)}){asked}"


def _failures(members: Iterable[Score]) -> str:
    """How often nothing was loaded, and why."""
    reasons = Counter(each.failure for each in members)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common() if reason)
    return f"of {reasons.total()} pairs nothing was loaded for {reasons.total() - reasons['']}" + (f" ({told})" if told else "")


def _false_pairs(scores: dict[str, dict[str, Score]]) -> list[str]:
    return [
        f"FALSE by {method} in {name}: {found.false}, for instance {', '.join(found.wrong)}"
        for method in ("dtl auto", "dtl auto, source_model")
        for name, found in scores.get(method, {}).items()
        if found.false
    ]


if __name__ == "__main__":
    sys.exit(main())
