"""What `dtl.checkpoint.transfer.match.auto` works on, and what it has found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Decided:
    """`certain`: target layer -> source layer, with `evidence`. `doubts`: target layer -> (reason, source layers that would fit)."""

    certain: dict[int, int] = field(default_factory=dict)
    evidence: dict[int, str] = field(default_factory=dict)
    doubts: dict[int, tuple[str, list[int]]] = field(default_factory=dict)

    def put(self, j: int, i: int, evidence: str) -> None:
        self.certain[j] = i
        self.evidence[j] = evidence
        self.doubts.pop(j, None)

    def doubt(self, j: int, reason: str, options: Sequence[int | None]) -> None:
        self.certain.pop(j, None)
        self.evidence.pop(j, None)
        self.doubts[j] = (reason, [i for i in options if i is not None])
