"""What became of each tensor, for people (a folded table) and for machines (`transfer.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dtl import text
from dtl.checkpoint.transfer.outcomes import Outcome
from dtl.checkpoint.transfer.plan import TransferPlan
from dtl.checkpoint.transfer.source.read import SourceWeights
from dtl.errors import printable
from dtl.files import without_nan

_ORDER = ("ambiguous", "fresh", "filled", "kept", "adapted", "loaded", "unused")
_MOST_ROWS = 60


@dataclass(frozen=True)
class TransferReport:
    """A plan with what is known about its source and, once `applied`, about its application.

    `checksum` covers the loaded tensors as they are in the model now; None for a dry run. `casts`: change of type -> tensors.
    """

    plan: TransferPlan
    source: str
    sha256: str | None = None
    container: str = ""
    passed_over: tuple[str, ...] = ()
    ordered: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    casts: dict[str, int] = field(default_factory=dict)
    checksum: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float | None = None
    verification: dict[str, Any] | None = None

    @classmethod
    def of(cls, plan: TransferPlan, weights: SourceWeights) -> TransferReport:
        return cls(
            plan,
            weights.origin,
            sha256=weights.sha256,
            container=weights.container,
            passed_over=weights.passed_over,
            ordered=weights.ordered,
            facts=weights.facts,
        )

    def applied(self, *, casts: dict[str, int], checksum: str, warnings: tuple[str, ...], seconds: float | None) -> TransferReport:
        return replace(self, casts=casts, checksum=checksum, warnings=warnings, seconds=seconds)

    @property
    def coverage(self) -> float:
        """Share (0..1) of the target's convolution and linear layers that were loaded, a replaced head aside."""
        return self.plan.coverage

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return self.plan.outcomes

    @property
    def fresh(self) -> tuple[str, ...]:
        """Names of target tensors that keep their initial values."""
        return self.plan.fresh

    def refusal(self) -> list[str]:
        """The first reason in the first line, the others and the table below it."""
        first, *others = self.plan.refusals
        lines = [f"transfer from {self.source} refused: {first}"]
        lines += [f"  also: {other}" for other in others[:5]]
        if len(others) > 5:
            lines.append(f"  and {len(others) - 5} reasons more")
        return [*lines, *self.lines()]

    def to_json(self, path: str | Path) -> None:
        """Write everything the report knows. Outcomes carry target, source, outcome, reason and the evidence."""
        Path(path).write_text(json.dumps(without_nan(self.to_dict()), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        facts = {name: value for name, value in self.facts.items() if name in ("architecture", "preprocessing")}
        return {
            "source": self.source,
            "sha256": self.sha256,
            "container": self.container,
            "passed_over": list(self.passed_over),
            "ordered": self.ordered,
            "by": self.plan.by,
            "view": self.plan.view,
            "prefix": list(self.plan.prefix),
            "plan": self.plan.digest,
            "coverage": self.coverage,
            "source_coverage": self.plan.source_coverage,
            "refusals": list(self.plan.refusals),
            "warnings": list(self.warnings),
            "notes": list(self.plan.notes),
            "casts": self.casts,
            "checksum": self.checksum,
            "seconds": self.seconds,
            "source_facts": facts,
            "verification": self.verification,
            "totals": totals(self.outcomes),
            "outcomes": [_plain(outcome) for outcome in self.outcomes],
        }

    def lines(self) -> list[str]:
        return [*map(printable, self._header()), *table(self.outcomes).split("\n")]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _header(self) -> list[str]:
        fresh = sum(o.parameters for o in self.outcomes if o.outcome in ("fresh", "ambiguous"))
        target = sum(o.parameters for o in self.outcomes if o.target) or 1
        lines = [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"{self.source}: coverage {self.coverage:.1%} of convolution and linear layers, fresh {fresh / target:.1%} of all parameters")
        details = [f"by {self.plan.by} ({self.plan.view})"]
        details += [f"{self.plan.source_coverage:.1%} of the source's layers used"] if self.plan.source_coverage < 1 else []
        details += [f"from '{self.container}'"] if self.container else []
        details += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        details += [f"{self.seconds:.2f} s"] if self.seconds is not None else []
        details += [f"{count} tensors cast {change}" for change, count in self.casts.items()]
        lines.append("  " + ", ".join(details))
        if self.passed_over:
            lines.append(f"  also in the file, not used: {', '.join(self.passed_over[:8])}")
        heads = [o for o in self.outcomes if o.head]
        if heads:
            lines.append(f"  head {fold([str(o.target) for o in heads])}: {heads[0].outcome}, {heads[0].reason}")
        lines += [f"  note: {note}" for note in self.plan.notes]
        counted = totals(self.outcomes)
        lines.append("  " + ", ".join(f"{name} {n['tensors']} tensors / {n['parameters']:,} parameters" for name, n in counted.items()))
        return lines


def totals(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """Outcome (with its evidence, where something was loaded) -> tensors and parameters; what is fresh comes first."""
    counted: dict[str, dict[str, int]] = {}
    for outcome in sorted(outcomes, key=lambda o: _ORDER.index(o.outcome)):
        name = f"{outcome.outcome} ({outcome.evidence})" if outcome.evidence else outcome.outcome
        spec = counted.setdefault(name, {"tensors": 0, "parameters": 0})
        spec["tensors"] += 1
        spec["parameters"] += outcome.parameters
    return counted


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per kind of layer and outcome, indices folded: `layer{1...4}.{0,1}.conv{1,2}`. Fresh first."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_row_key(outcome), []).append(outcome)
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: _ORDER.index(item[0][0])):
        names = [o.target for o in members if o.target]
        sources = [name for o in members for name in o.sources]
        why = members[0].transform + ": " + members[0].reason if members[0].transform else members[0].reason
        if members[0].alternatives:
            why += f"; could be {', '.join(members[0].alternatives[:3])}"
        rows.append((key[0], fold(names) or "-", fold(sources) or "-", str(len(members)), why))
    columns = [text.Column("outcome"), text.Column("target"), text.Column("source"), text.Column("tensors", right=True), text.Column("why")]
    more = len(rows) - _MOST_ROWS
    lines = text.table(columns, rows[:_MOST_ROWS])
    return f"{lines}\n... and {more} rows more (all of them in the JSON report)" if more > 0 else lines


def _row_key(outcome: Outcome) -> tuple[str, ...]:
    name = outcome.target or outcome.sources[0]
    path = name.rpartition(".")[0] or name
    return outcome.outcome, re.sub(r"\d+", "#", path), outcome.evidence, outcome.transform, "" if outcome.target else outcome.reason


def fold(names: Sequence[str]) -> str:
    """Names that differ in numbers and last words, as one pattern: `layer{1...4}.{0,1}.conv1.{weight,bias}`."""
    if not names:
        return ""
    split = [re.split(r"(\d+)", name.rpartition(".")[0]) for name in names]
    if len({tuple(parts[::2]) for parts in split}) > 1:
        return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    columns = [list(dict.fromkeys(parts[column] for parts in split)) for column in range(len(split[0]))]
    path = "".join(column[0] if len(column) == 1 else _numbers(column) for column in columns)
    words = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    word = words[0] if len(words) == 1 else "{" + ",".join(words) + "}"
    if len(words) > 4:
        word = "*"
    return f"{path}.{word}" if path else word


def _numbers(texts: list[str]) -> str:
    numbers = sorted(int(text) for text in texts)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}...{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    names = ["source" if each.name == "sources" else each.name for each in fields(outcome)]
    values = {name: getattr(outcome, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def save_map(plan: TransferPlan, path: str | Path) -> None:
    """Write what a plan would load as a map, and what it could not decide as comments with the lines that settle it."""
    import yaml

    path = Path(path)
    rules = {o.target: _saved(o, plan) for o in plan.outcomes if o.target and o.source and o.outcome in ("loaded", "adapted")}
    if path.suffix == ".json":
        path.write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")
        return
    lines = ["# target: source. Edit, then feed back with --by map --map THIS_FILE.\n"]
    for target, alternatives in plan.flagged.items():
        lines += [f"# undecided: {target}: {name}\n" for name in alternatives[:6]]
    for target, rule in rules.items():
        # A pair a line, since people edit it; what has options is JSON, which is YAML too.
        line = yaml.safe_dump({target: rule}, width=2**20) if isinstance(rule, str) else f"{yaml.safe_dump({target: 0})[:-4]}: {json.dumps(rule)}\n"
        lines.append(line)
    path.write_text("".join(lines), encoding="utf-8")


def _saved(outcome: Outcome, plan: TransferPlan) -> Any:
    """The right side of a rule that says what an outcome did."""
    several = len(outcome.sources) > 1
    source = list(outcome.sources) if several else outcome.sources[0]
    rule: dict[str, Any] = {"source": source}
    if outcome.transform not in ("", "fuse" if several else ""):
        rule["transform"] = outcome.transform
    if outcome.transform == "rows" and plan.head_rows is not None:
        rule["rows"] = [pick[0] if len(pick) == 1 else list(pick) for pick in plan.head_rows]
    if outcome.target in plan.ties:
        rule["shared"] = True
    return rule if len(rule) > 1 else source
