"""The result of one check, and the worst of several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dtl import text

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`check`: what was checked, one word; `summary`: the result; `fix`: the command that fixes it (may be empty if the status is ok)."""

    check: str
    status: Status
    summary: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.fix, f"a finding without a fix: {self.check}: {self.summary}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def table(findings: Iterable[Finding]) -> str:
    """Lines for a terminal: one for each finding, its fix below it."""
    marks = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
    columns, lines = (text.Column(least=4), text.Column(least=12), text.Column()), []
    for one in findings:
        lines.append(text.table(columns, [(marks[one.status], one.check, one.summary)]))
        if one.fix:
            lines.append(f"{'':20}-> {text.printable(one.fix)}")  # a line of its own that nothing wraps: it is there to be copied
    return "\n".join(lines)
