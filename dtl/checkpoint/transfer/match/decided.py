"""What `dtl.checkpoint.transfer.match.auto` works on, and what it has found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dtl.checkpoint.transfer.layers.trace import Dataflow
from dtl.checkpoint.transfer.layers.units import Unit


@dataclass
class Side:
    units: list[Unit]
    flow: Dataflow | None


@dataclass
class Decided:
    """`certain`: target unit -> source unit, with `evidence`. `doubts`: target unit -> (reason, source units that would fit)."""

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
