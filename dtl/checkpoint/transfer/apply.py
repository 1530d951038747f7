"""Load pretrained weights into any network: read, plan, check everything, then copy. All or nothing. And the report of it: what became of each
tensor, for people (a folded table) and for machines (`transfer.json`)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dtl import text
from dtl.checkpoint.transfer.adapt import apply_transform
from dtl.checkpoint.transfer.match.evidence import Flag
from dtl.checkpoint.transfer.outcomes import REFUSED, Outcome
from dtl.checkpoint.transfer.plan import TransferPlan, plan_weights
from dtl.checkpoint.transfer.source.read import SourceWeights, read_weights
from dtl.config.models import ImageSize, TransferBy, TransferOptions, arguments_checked
from dtl.errors import TransferRefused, UserError, printable
from dtl.files import sha256_of_tensors, write_json_whole, write_whole, written


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
    adapter: str | Path | None = None,
    heads: Sequence[str] | None = None,
    head_rows: str | Path | Mapping[str, str | Sequence[str]] | None = None,
    source_classes: str | Path | Sequence[str] | None = None,
    target_classes: str | Path | Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    fresh: Sequence[str] = (),
    fill: Mapping[str, str] | None = None,
    fold_norms: bool = False,
    image_size: ImageSize | None = None,
    target_preprocessing: Mapping[str, Any] | None = None,
) -> TransferReport:
    """Load the weights of `source` (see `read_weights`) into `model`, in place, and report what became of each tensor.

    `adapter`: a folder of PEFT with a LoRA adapter, which is merged into `source`, its base (`with_adapter`).
    The options are those of `plan_transfer`; class names may be a file or a folder too (`read_class_names`).
    `target_preprocessing` (mean, std) is compared with the source's own preprocessing. Raises `TransferRefused`, the model
    untouched, when too little fits, when a tensor is in doubt, or when a value is not finite; its message holds the reason and
    the table of outcomes.
    """
    started = time.perf_counter()
    with arguments_checked():
        options = TransferOptions.model_validate(
            {
                "by": by,
                "assume_order": assume_order,
                "on_ambiguous": on_ambiguous,
                "min_coverage": min_coverage,
                "ignore": ignore,
                "fresh": fresh,
                "keep_head": "auto" if keep_head is None else keep_head,
                "head_rows": head_rows,
                "source_classes": source_classes,
                "fill": {} if fill is None else fill,
                "fold_norms": fold_norms,
            }
        )
    weights = read_weights(source, key=key)
    if adapter is not None:
        from dtl.checkpoint.transfer.source.adapter import with_adapter

        weights = with_adapter(weights, adapter)
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
    """Copy the planned tensors into the model. Raises TransferRefused before the first change when anything is wrong."""
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
        checksum=_checksum(plan, weights, {name: targets[name] for name in values}),
        warnings=_warnings(plan, weights, target_preprocessing),
        seconds=seconds,
    )


def _checksum(plan: TransferPlan, weights: SourceWeights, loaded: dict[str, torch.Tensor]) -> str:
    """Of what was loaded. A file was hashed when it was read, so its hash, the plan and the types say it all; else of the tensors in the model."""
    if weights.sha256 is None:
        return sha256_of_tensors(loaded)
    types = sorted((name, str(value.dtype)) for name, value in loaded.items())
    return hashlib.sha256(json.dumps([weights.sha256, plan.digest, types]).encode()).hexdigest()


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
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return f"has dtype {tensor.dtype}, whose values mean something with their scale only; convert it to float16 or float32 first".replace("torch.", "")
    if tensor.is_quantized or (target.is_floating_point() and not tensor.is_floating_point()):
        return f"has dtype {tensor.dtype} (quantised, or not a weight); convert it to floating point first".replace("torch.", "")
    return None


def _impossible(name: str, value: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a value must not get into the network."""
    if not value.is_floating_point():
        return None
    if not _all_finite(value):
        return "holds values that are not finite (NaN or infinite)"
    narrower = dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(value.dtype).max
    if narrower and not _all_finite(value.to(dtype)):
        return f"holds values too large for {dtype}".replace("torch.", "")
    if name.endswith("running_var") and bool((value < 0).any()):
        return "holds negative variances"
    return None


def _all_finite(value: torch.Tensor) -> bool:
    """A finite sum has finite terms only, and a sum is one pass without a second tensor. A sum may overflow by itself: then each value is looked at."""
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(value).all())


def _agree_on_ties(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Names that share one tensor get one value: drop the repeats, refuse where the source disagrees with itself."""
    first: dict[int, str] = {}
    for name in list(values):
        earlier = first.setdefault(id(targets[name]), name)
        if earlier == name:
            continue
        if not torch.equal(values[earlier], values[name]):
            raise TransferRefused(f"{earlier} and {name} share one tensor in this network, but the source has two different ones; nothing was loaded")
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
    return plan.warnings + _unchecked(weights) + _untrained(plan, weights) + _other_preprocessing(weights.facts.get("preprocessing"), target_preprocessing)


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
    if means and plan.ok and not any(bool(mean.any()) for mean in means):
        return ("the source looks untrained: all of its running means are zero",)
    return ()


# ---- the report


_ORDER = ("ambiguous", "fresh", "filled", "kept", "adapted", "loaded", "unused")
_MOST_ROWS, _FEW_ROWS = 60, 12
_TITLES = ("outcome", "target", "source", "tensors", "why")


@dataclass(frozen=True, repr=False)
class TransferReport:
    """A plan with what is known about its source and, once `applied`, about its application.

    `checksum` stands for what was loaded, equal where that is equal: a hash of the file's SHA-256, the plan and the model's types, or, where the weights are
    no file, of the tensors in the model. None for a dry run. `casts`: change of dtype -> number of tensors.
    """

    plan: TransferPlan
    source: str
    sha256: str | None = None
    container: str = ""
    passed_over: tuple[str, ...] = ()
    adapter: str = ""
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
            adapter=weights.adapter,
            ordered=weights.ordered,
            facts=weights.facts,
            warnings=plan.warnings,
        )

    def applied(self, *, casts: dict[str, int], checksum: str, warnings: tuple[str, ...], seconds: float | None) -> TransferReport:
        return replace(self, casts=casts, checksum=checksum, warnings=warnings, seconds=seconds)

    @property
    def coverage(self) -> float:
        """Share (0..1) of the target's layers that were loaded, not counting a replaced head: each layer, norm, table and scale counts once,
        one of which only some tensors were loaded (a weight without its bias) by the share of these."""
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
            lines.append(f"  and {len(others) - 5} more reasons")
        return [*lines, *self.lines()]

    def to_json(self, path: str | Path) -> None:
        """Write everything the report knows. Outcomes carry target, source, outcome, reason and the evidence. UserError where it cannot be written."""
        with written(path):
            write_json_whole(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        facts = {name: value for name, value in self.facts.items() if name in ("architecture", "preprocessing")}
        return {
            "source": self.source,
            "sha256": self.sha256,
            "container": self.container,
            "passed_over": list(self.passed_over),
            "adapter": self.adapter,
            "ordered": self.ordered,
            "by": self.plan.by,
            "view": self.plan.view,
            "prefix": list(self.plan.prefix),
            "plan": self.plan.digest,
            "coverage": self.coverage,
            "source_coverage": self.plan.source_coverage,
            "refusals": list(self.plan.refusals),
            "warnings": list(self.warnings),
            "random": list(self.plan.random),
            "notes": list(self.plan.notes),
            "casts": self.casts,
            "checksum": self.checksum,
            "seconds": self.seconds,
            "source_facts": facts,
            "verification": self.verification,
            "totals": totals(self.outcomes),
            "lines": self._header(),
            "table": [list(row) for row in rows(self.outcomes)[:_MOST_ROWS]],
            "outcomes": [_plain(outcome) for outcome in self.outcomes],
        }

    def lines(self) -> list[str]:
        return [*map(printable, self._header()), *table(self.outcomes).split("\n")]

    def short_lines(self) -> list[str]:
        """For a log: the beginning of the table only."""
        return [*map(printable, self._header()), *table(self.outcomes, most=_FEW_ROWS).split("\n")]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        """One line: the last line of a notebook's cell, a debugger. `str()` is the table."""
        counts = ", ".join(f"{self.plan.count(outcome)} {outcome}" for outcome in _ORDER if self.plan.count(outcome))
        return printable(f"<TransferReport from {self.source}: {'refused' if self.plan.refusals else f'coverage {self.coverage:.1%}'}, {counts}>")

    def _repr_html_(self) -> str:
        """For notebooks: what `str()` says."""
        found = rows(self.outcomes)
        said = "".join(f"<div>{escape(printable(line))}</div>" for line in self._header())
        titles = "".join(f"<th>{title}</th>" for title in _TITLES)
        body = "".join(f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>" for row in found[:_MOST_ROWS])
        more = f"<div>{_and_more(len(found))}</div>" if len(found) > _MOST_ROWS else ""
        return f"{said}<table><tr>{titles}</tr>{body}</table>{more}"

    def _header(self) -> list[str]:
        fresh = sum(o.parameters for o in self.outcomes if o.outcome in ("fresh", "ambiguous"))
        target = sum(o.parameters for o in self.outcomes if o.target) or 1
        lines = [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"{self.source}: coverage {self.coverage:.1%} of all layers, norms and tables, {fresh / target:.1%} of all parameters newly initialised")
        details = [f"by {self.plan.by} ({self.plan.view})"]
        details += [f"{self.plan.source_coverage:.1%} of the source's layers used"] if self.plan.source_coverage < 1 else []
        details += [f"from '{self.container}'"] if self.container else []
        details += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        details += [f"{self.seconds:.2f} s"] if self.seconds is not None else []
        details += [f"{count} tensors cast {change}" for change, count in self.casts.items()]
        lines.append("  " + ", ".join(details))
        if self.adapter:
            lines.append(f"  with the adapter {self.adapter}")
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


def table(outcomes: Sequence[Outcome], *, most: int = _MOST_ROWS) -> str:
    found = rows(outcomes)
    lines = text.table([text.Column(title, right=title == "tensors") for title in _TITLES], found[:most])
    return f"{lines}\n{_and_more(len(found), most)}" if len(found) > most else lines


def _and_more(count: int, most: int = _MOST_ROWS) -> str:
    return f"... and {count - most} more rows (the JSON report has all of them)"


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """One row per kind of layer and outcome, indices folded: `layer{1...4}.{0,1}.conv{1,2}`. Fresh first."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_row_key(outcome), []).append(outcome)
    found: list[tuple[str, ...]] = []
    for key, members in sorted(groups.items(), key=lambda item: _ORDER.index(item[0][0])):
        names = [o.target for o in members if o.target]
        refused = members[0].reason.startswith(REFUSED)
        sources = [name for o in members for name in (o.alternatives if refused and o.target else o.sources)]
        why = members[0].transform + ": " + members[0].reason if members[0].transform else members[0].reason
        if members[0].alternatives and not refused:
            why += f"; could be {', '.join(members[0].alternatives[:3])}"
        found.append((key[0], fold(names) or "-", fold(sources) or "-", str(len(members)), why))
    return found


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
    """Write what a plan would load as a map; as comments what it could not decide, with the lines that decide it, and what a refusal keeps back."""
    import yaml

    path = Path(path)
    rules = {o.target: _saved(o, plan) for o in plan.outcomes if o.target and o.source and o.outcome in ("loaded", "adapted")}
    if path.suffix == ".json":
        with written(path):
            write_json_whole(path, rules)
        return
    lines = ["# target: source. Edit this file, then use it with --by map --map THIS_FILE.\n"]
    for target, alternatives in plan.flagged.items():
        lines += [f"# undecided: {target}: {name}\n" for name in alternatives[:6]]
    candidates = [o for o in plan.outcomes if o.target and o.reason.startswith(REFUSED)]
    if candidates:
        lines.append("# The transfer was refused. These pairs were found; take the # from those that are right.\n")
    lines += [f"# {Flag('', ((tuple(o.alternatives[0].split(' + ')), o.transform),)).line(str(o.target))}\n" for o in candidates]
    for target, rule in rules.items():
        # A pair a line, since people edit it; what has options is JSON, which is YAML too.
        line = yaml.safe_dump({target: rule}, width=2**20) if isinstance(rule, str) else f"{yaml.safe_dump({target: 0})[:-4]}: {json.dumps(rule)}\n"
        lines.append(line)
    with written(path):
        write_whole(path, lambda file: file.write("".join(lines).encode()))


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
