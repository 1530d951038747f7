"""One thing that the doctor has found, and how many of them there are to worry about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`check`: what was looked at, one word; `summary`: what was found; `fix`: the line that mends it, which only what is ok can do without."""

    check: str
    status: Status
    summary: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.fix, f"a finding without what mends it: {self.check}: {self.summary}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def table(findings: Iterable[Finding]) -> str:
    """Lines for a terminal: one a finding, its remedy below it."""
    lines = []
    for finding in findings:
        mark = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}[finding.status]
        lines.append(f"{mark}  {finding.check:<12}  {finding.summary}")
        if finding.fix:
            lines.append(f"      {'':<12}  -> {finding.fix}")
    return "\n".join(lines)
