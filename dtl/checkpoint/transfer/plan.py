"""The plan of a transfer: one outcome for every tensor of the target and every unused tensor of the source.

Pure: names and shapes in, a `TransferPlan` out; no tensor is read, nothing is changed. `dtl.checkpoint.transfer.apply` applies it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from dtl.checkpoint.transfer.coverage import set_aside
from dtl.checkpoint.transfer.layers.target import target_of
from dtl.checkpoint.transfer.layers.units import Entry, Key, entries_of
from dtl.checkpoint.transfer.match.heads import head_units
from dtl.checkpoint.transfer.match.matching import Clash
from dtl.checkpoint.transfer.outcomes import Outcome, Policy, settle
from dtl.checkpoint.transfer.planners import PlanRequest, match
from dtl.errors import UserError

By = Literal["auto", "name", "order", "strict", "map"]


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would do.

    `outcomes`: one per target tensor, in the target's order, then one per unused source tensor.
    `coverage`: share of the target's convolution and linear units that get weights, a replaced head aside;
    `source_coverage`: share of the source's that are used, its own head and what lies outside of the prefix aside.
    `refusals`: why it must not be applied, worst first; empty for a plan that may. `pairs` is empty when the refusal is of
    the whole (coverage, rivals, names that lie), and holds what is certain when only single tensors are in doubt.
    """

    by: str
    view: str
    outcomes: tuple[Outcome, ...]
    coverage: float
    source_coverage: float
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    clashes: tuple[Clash, ...] = ()
    prefix: tuple[str, str] = ("", "")
    source_entries: list[Entry] = field(default_factory=list, repr=False, compare=False)
    """The source's tensors that belong to the network asked for."""
    ties: tuple[str, ...] = ()
    """Second names of tensors that two modules of the target share."""
    head_rows: tuple[tuple[int, ...], ...] | None = None
    """For each class of the target the rows of the source's head that become its row (their mean)."""

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def pairs(self) -> dict[str, Key]:
        """Target tensor -> source tensor (a tuple of them where several are joined), for all that would be loaded."""
        return {o.target: o.source for o in self.outcomes if o.target and o.source and o.outcome in ("loaded", "adapted")}

    @property
    def flagged(self) -> dict[str, tuple[str, ...]]:
        """Undecided target tensor -> source tensors or layers that would fit."""
        return {o.target: o.alternatives for o in self.outcomes if o.target and o.outcome == "ambiguous"}

    @property
    def fresh(self) -> tuple[str, ...]:
        """Target tensors that keep the values they have."""
        return tuple(o.target for o in self.outcomes if o.target and o.outcome in ("fresh", "ambiguous"))

    @property
    def digest(self) -> str:
        """SHA-256 of what goes where: ranks compare it."""
        text = json.dumps([[(o.target, o.source, o.outcome, o.transform) for o in self.outcomes], self.head_rows])
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self, *outcomes: str) -> int:
        return sum(o.outcome in outcomes for o in self.outcomes)


def plan_transfer(
    source_tensors: Mapping[str, torch.Tensor],
    model: nn.Module | Mapping[str, torch.Tensor],
    *,
    by: By = "auto",
    assume_order: bool = False,
    source_model: nn.Module | None = None,
    mapping: Any = None,
    heads: Sequence[str] | None = None,
    keep_head: bool | Literal["rows"] | None = None,
    head_rows: Mapping[str, str | Sequence[str]] | None = None,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
    on_ambiguous: Literal["error", "fresh"] = "error",
    min_coverage: float = 0.6,
    ordered: bool | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
    fill: Mapping[str, str] | None = None,
    fold_norms: bool = False,
    image_size: int | None = None,
    trace: bool = True,
) -> TransferPlan:
    """Plan how `source_tensors` go into `model`, by names and shapes alone.

    `by`: name, order (equal sequences of shapes, else aligned with gaps), strict (equal sequences or nothing), map, or auto (names
    where they can be trusted, then alignment; never a guess).
    `assume_order`: accept pairs that only the order of registration tells apart. `source_model`: the network the weights
    were made for; with it both execution orders are known. `mapping`: for `by="map"`, a file or a dict
    of rules (`dtl.checkpoint.transfer.match.by_map`); with `by="auto"` its lines settle single layers.
    `heads`: dotted names of the classifier's modules (found when not given). `keep_head`: None loads the head when shapes
    are equal and class lists, where both are known, agree; "rows" picks its rows by class names. `head_rows`: target class ->
    source class, or several whose rows are averaged; all others by their own name.
    `ordered`: whether `source_tensors` stand in registration order (guessed from the names when None).
    `prefix`: use only source names that begin with it. `ignore`: patterns (`decoder.*`) of source names to set aside: they are not
    used, and do not count where `min_coverage` asks how much of the source is. `fill={"conv_bias": "zero"}`: biases that the source's layers do not
    have are zero, not random. `fold_norms`: a source norm with no place here is folded into its convolution.
    `trace=False` skips the run of `model` on the meta device.
    Raises UserError on contradictory arguments; a transfer that should not happen comes back with `refusals`.
    """
    if by not in get_args(By):
        raise UserError(f"by: {by!r} is not one of {', '.join(get_args(By))}")
    if not 0 <= min_coverage <= 1:
        raise UserError(f"min_coverage: {min_coverage} is not between 0 and 1")
    if head_rows and keep_head != "rows":
        raise UserError("head_rows: needs keep_head: rows")
    target = target_of(model, image_size=image_size, trace=trace)
    source, ignored = set_aside(entries_of(source_tensors), ignore)
    request = PlanRequest(
        source=source,
        target=target,
        heads=head_units(target.units, heads),
        by=by,
        assume_order=assume_order,
        source_model=source_model,
        mapping=mapping,
        ordered=ordered,
        prefix=prefix,
        image_size=image_size,
    )
    policy = Policy(
        keep_head=keep_head,
        head_rows=head_rows,
        source_classes=source_classes,
        target_classes=target_classes,
        on_ambiguous=on_ambiguous,
        min_coverage=min_coverage,
        fill=dict(fill or {}),
        fold_norms=fold_norms,
    )
    return _finish(request, policy, ignored)


def _finish(request: PlanRequest, policy: Policy, ignored: list[Entry]) -> TransferPlan:
    found = match(request)
    settled = settle(found.matching, request.source, request.target, request.heads, policy, inside=found.inside, ignored=ignored)
    return TransferPlan(
        by=request.by,
        view=found.matching.view,
        outcomes=settled.outcomes,
        coverage=settled.coverage,
        source_coverage=settled.source_coverage,
        refusals=settled.refusals,
        notes=tuple(found.matching.notes),
        clashes=tuple(found.matching.clashes),
        prefix=found.prefix,
        source_entries=[entry for entry in request.source if found.inside is None or entry.name in found.inside],
        ties=tuple(request.target.ties),
        head_rows=settled.head_rows,
    )
