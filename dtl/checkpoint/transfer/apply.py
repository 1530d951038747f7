"""Load pretrained weights into any network: read, plan, check everything, then copy. All or nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dtl.checkpoint.transfer.adapt import apply_transform
from dtl.checkpoint.transfer.plan import TransferPlan, plan_weights
from dtl.checkpoint.transfer.report import TransferReport
from dtl.checkpoint.transfer.source.read import SourceWeights, read_weights
from dtl.config.models import FillConfig, TransferBy, TransferOptions, arguments_checked
from dtl.errors import TransferRefused, UserError
from dtl.files import sha256_of_tensors


def load_pretrained(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | nn.Module | SourceWeights,
    by: TransferBy = "auto",
    mapping: Any = None,
    assume_order: bool = False,
    source_model: nn.Module | None = None,
    on_ambiguous: Literal["error", "fresh"] = "error",
    min_coverage: float = 0.6,
    keep_head: bool | Literal["rows"] | None = None,
    *,
    key: str | None = None,
    heads: Sequence[str] | None = None,
    head_rows: str | Path | Mapping[str, str | Sequence[str]] | None = None,
    source_classes: str | Path | Sequence[str] | None = None,
    target_classes: str | Path | Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    fill: Mapping[str, str] | None = None,
    fold_norms: bool = False,
    image_size: int | None = None,
    target_preprocessing: Mapping[str, Any] | None = None,
) -> TransferReport:
    """Load the weights of `source` (see `read_weights`) into `model`, in place, and report what became of each tensor.

    The options are those of `plan_transfer`; class names may be a file or a folder too (`read_class_names`).
    `target_preprocessing` (mean, std) is compared with the source's own preprocessing. Raises `TransferRefused`, the model
    untouched, when too little fits, when a tensor is in doubt, or when a value is not finite; its message holds the reason and
    the table of outcomes.
    """
    started = time.perf_counter()
    with arguments_checked():
        options = TransferOptions(
            by=by,
            assume_order=assume_order,
            on_ambiguous=on_ambiguous,
            min_coverage=min_coverage,
            ignore=tuple(ignore),
            keep_head="auto" if keep_head is None else keep_head,
            head_rows=head_rows,
            source_classes=source_classes,
            fill=FillConfig(**dict(fill or {})),
            fold_norms=fold_norms,
        )
    weights = read_weights(source, key=key)
    plan = plan_weights(
        weights,
        model,
        options,
        mapping=mapping,
        source_model=source_model,
        heads=heads,
        target_classes=target_classes,
        image_size=image_size,
    )
    return apply_plan(plan, weights, model, target_preprocessing=target_preprocessing, started=started)


def apply_plan(
    plan: TransferPlan,
    weights: SourceWeights,
    model: nn.Module,
    *,
    target_preprocessing: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> TransferReport:
    """Copy what the plan says into the model. Raises TransferRefused before the first change when anything is wrong."""
    report = TransferReport.of(plan, weights)
    if plan.refusals:
        raise TransferRefused(*report.refusal())
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    values = _values(plan, weights, targets)
    _agree_on_ties(targets, values)
    with torch.no_grad():
        for name, value in values.items():
            target = targets[name]
            # copy_ broadcasts in silence, so shapes are asserted at the last moment, whatever was checked before.
            assert tuple(value.shape) == tuple(target.shape), f"{name}: {tuple(value.shape)} into {tuple(target.shape)}"
            target.copy_(value)
    seconds = None if started is None else time.perf_counter() - started
    return report.applied(
        casts=_casts(values.items(), targets),
        checksum=sha256_of_tensors({name: targets[name] for name in values}),
        warnings=_warnings(plan, weights, target_preprocessing),
        seconds=seconds,
    )


def preview(
    plan: TransferPlan,
    weights: SourceWeights,
    model: nn.Module,
    *,
    target_preprocessing: Mapping[str, Any] | None = None,
) -> TransferReport:
    """What `apply_plan` would report, with nothing copied: the model may be on the meta device, and one value at a time has memory.

    What would be refused for its values comes back as a refusal of the report's plan.
    """
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    try:
        casts = _casts(_each_value(plan, weights, targets) if plan.ok else (), targets)
    except TransferRefused as refused:
        plan, casts = replace(plan, refusals=(str(refused),)), {}
    return replace(TransferReport.of(plan, weights), casts=casts, warnings=_warnings(plan, weights, target_preprocessing))


def _values(plan: TransferPlan, weights: SourceWeights, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Target tensor -> the value it gets, each checked: shape, allocated target, finite."""
    for name in (o.target for o in plan.outcomes if o.target and o.outcome in ("loaded", "adapted", "filled")):
        if targets[name].is_meta:
            raise UserError(f"{name} has no memory (meta device): allocate the model before loading weights into it")
    return dict(_each_value(plan, weights, targets))


def _each_value(plan: TransferPlan, weights: SourceWeights, targets: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for outcome in plan.outcomes:
        name = outcome.target
        if name is None or outcome.outcome not in ("loaded", "adapted", "filled"):
            continue
        target = targets[name]
        if not outcome.sources:
            yield name, torch.zeros_like(target)
            continue
        keys = outcome.sources
        tensors = [weights.tensors[key] for key in keys]
        problem = next((why for tensor in tensors if (why := _unusable(tensor, target))), None)
        if problem is not None:
            raise TransferRefused(f"{name}: {'+'.join(keys)} {problem}; nothing was loaded")
        value = apply_transform(outcome.transform, tensors, tuple(target.shape), picks=plan.head_rows) if outcome.transform else tensors[0]
        if value.shape != target.shape:
            raise TransferRefused(f"{name} {list(target.shape)}: {'+'.join(keys)} gives {list(value.shape)}; nothing was loaded")
        problem = _impossible(name, value, target.dtype)
        if problem is not None:
            raise TransferRefused(f"{name}: {'+'.join(keys)} {problem}; nothing was loaded")
        yield name, value


def _unusable(tensor: torch.Tensor, target: torch.Tensor) -> str | None:
    """Why a source tensor's values cannot be read as they are."""
    if tensor.is_meta:
        return "has no values (meta device)"
    if tensor.is_quantized or (target.is_floating_point() and not tensor.is_floating_point()):
        return f"is of type {tensor.dtype}, quantised or not weights at all; convert it to floating point first".replace("torch.", "")
    return None


def _impossible(name: str, value: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a value must not get into the network."""
    if not value.is_floating_point():
        return None
    if not bool(torch.isfinite(value).all()):
        return "holds values that are not finite (NaN or infinite)"
    if dtype.is_floating_point and not bool(torch.isfinite(value.to(dtype)).all()):
        return f"holds values too large for {dtype}".replace("torch.", "")
    if name.endswith("running_var") and bool((value < 0).any()):
        return "holds negative variances"
    return None


def _agree_on_ties(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Names that share one tensor get one value: drop the repeats, refuse where the source disagrees with itself."""
    first: dict[int, str] = {}
    for name in list(values):
        earlier = first.setdefault(id(targets[name]), name)
        if earlier == name:
            continue
        if not torch.equal(values[earlier], values[name]):
            raise TransferRefused(f"{earlier} and {name} share one tensor here, but the source has two different ones; nothing was loaded")
        del values[name]


def _casts(values: Iterable[tuple[str, torch.Tensor]], targets: dict[str, torch.Tensor]) -> dict[str, int]:
    """ "float16 -> float32" -> number of tensors."""
    counts: dict[str, int] = {}
    for name, value in values:
        if value.dtype != targets[name].dtype:
            change = f"{value.dtype} -> {targets[name].dtype}".replace("torch.", "")
            counts[change] = counts.get(change, 0) + 1
    return counts


def _warnings(plan: TransferPlan, weights: SourceWeights, target_preprocessing: Mapping[str, Any] | None) -> tuple[str, ...]:
    return _unchecked(weights) + _untrained(plan, weights) + _other_preprocessing(weights.facts.get("preprocessing"), target_preprocessing)


def _other_preprocessing(source: Any, target: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Images normalised in another way than the weights were trained with."""
    if not isinstance(source, Mapping) or target is None:
        return ()
    lines = []
    for name in ("mean", "std"):
        ours, theirs = target.get(name), source.get(name)
        if ours is not None and theirs is not None and any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs)):
            lines.append(f"the source was trained with {name} {list(theirs)}, here it is {list(ours)}")
    return tuple(lines)


def _unchecked(weights: SourceWeights) -> tuple[str, ...]:
    """A model folder of dtl 0.1.0 does not say which weights are its own."""
    if "format" in weights.facts and weights.facts.get("weights") is None:
        return (f"the model.json beside {weights.origin} records no SHA-256 of the weights (an older dtl wrote it): they are used unchecked",)
    return ()


def _untrained(plan: TransferPlan, weights: SourceWeights) -> tuple[str, ...]:
    """A network that never saw data has running means of zero."""
    means = [weights.tensors[o.sources[0]] for o in plan.outcomes if o.target and o.target.endswith("running_mean") and len(o.sources) == 1]
    if means and not any(bool(mean.any()) for mean in means):
        return ("the source looks untrained: all of its running means are zero",)
    return ()
