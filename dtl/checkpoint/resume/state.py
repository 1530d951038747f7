"""What a resume needs beside the model's own tensors: the optimizer by parameter names, the counters, the settings.

A `torch.amp.GradScaler` needs nothing from here: its `state_dict()` is plain numbers, which JSON keeps exactly.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dtl.config import flat
from dtl.errors import UserError
from dtl.untrusted import NumbersObject, Record, Text, check_form

# Of a checkpoint: its manifest, and its state. 3: phase and results are records of their own, the version of the plan and the epoch's loss are stored.
FORMAT = 3
OTHERWISE = "start another run with --run.name NEW, or restart this one from the beginning with --run.resume never"
# How torch computes a step, not what it computes: whoever builds the optimizer decides these anew on each machine.
_EXECUTION_OPTIONS = frozenset({"foreach", "fused", "capturable"})


@dataclass
class Best:
    """The best evaluation of a phase so far."""

    metric: str
    value: float
    step: int
    loss: float = math.inf
    """Of that evaluation. Where the metric is equal, the lower loss is better."""


@dataclass
class Kept:
    """The evaluation whose weights a phase leaves behind."""

    step: int
    epoch: int
    train_loss: float | None
    """Mean over its epoch, up to it."""
    val: dict[str, Any]
    """Its metrics."""


@dataclass
class PhaseProgress:
    """How far the phase under way has come. A phase begins with a new one, so nothing of the phase before is left in it."""

    name: str = ""
    index: int = 0
    step: int = 0
    """Steps done within the phase."""
    ended: bool = False
    """By early stopping, before its last step."""
    pending_eval: bool = False
    """An evaluation is due, or was interrupted."""
    evaluations_without_gain: int = 0
    """The counter of early stopping."""
    kept: Kept | None = None
    looks: int | None = 0
    """Evaluations of the phase so far, of which the kept one was chosen; None where an older dtl did not count them."""
    num_images: int = 0
    """Trained on so far, over all ranks."""
    train_seconds: float = 0.0
    """Spent in training steps: no evaluation, no checkpoint."""
    train_loss: float | None = None
    """Mean of the epoch under way when it was last looked at, over all its samples; at an epoch's end of the whole epoch."""
    epoch_loss: float = 0.0
    """With the window's the sums of the epoch under way, over all ranks: of the loss, and of the weights of its samples."""
    epoch_weight: float = 0.0
    window_loss: float = 0.0
    """Sums since the last log line, over all ranks: of the loss, and of the weights of its samples."""
    window_weight: float = 0.0
    epoch_seen: int = 0
    """Samples of the epoch under way that were trained on, over all ranks, and damaged ones among them."""
    epoch_damaged: int = 0
    micro_batch_size: int | None = None
    """What fitted into memory, where a rank's whole share did not."""


@dataclass
class RunResults:
    """What the phases of the run have come to so far."""

    phases: list[dict[str, Any]] = field(default_factory=list)
    """One row a finished phase, for the closing table and status.json."""
    best: dict[str, Best] = field(default_factory=dict)
    """By phase."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent in each phase so far, over all starts."""


@dataclass
class TrainState:
    """Where a run stands. Steps are optimizer updates, counted from 1 when done; `step` and `epoch` count on over all phases."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    """Steps done within the epoch."""
    phase: PhaseProgress = field(default_factory=PhaseProgress)
    results: RunResults = field(default_factory=RunResults)
    wandb_id: str | None = None
    dataset_ids: dict[str, str] = field(default_factory=dict)
    """By split."""
    world_size: int = 1
    num_threads: int = 1
    """Of each rank: the order in which sums are taken depends on it."""
    history_offset: int = 0
    """Bytes of history.jsonl that belong to this state."""
    incarnation: int = 0
    bad_samples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainState:
        """Raises UserError for a state that another version of dtl has written, or one with unknown, missing or wrong fields."""
        found = value.get("format")
        if not isinstance(found, int):
            raise UserError("the checkpoint's state has no format number: it was not written by dtl")
        check_format(found, "the checkpoint's state")
        values = _fields(cls, {key: inner for key, inner in value.items() if key != "format"})
        if isinstance(values["phase"], Mapping):
            values["phase"] = {"looks": None, **values["phase"]}  # an older dtl did not write it
        check_form(cls, values, "the checkpoint's state")
        phase, results = _fields(PhaseProgress, values["phase"]), _fields(RunResults, values["results"])
        if phase["kept"] is not None:
            phase["kept"] = Kept(**_fields(Kept, phase["kept"]))
        results["best"] = {name: Best(**_fields(Best, best)) for name, best in results["best"].items()}
        return cls(**{**values, "phase": PhaseProgress(**phase), "results": RunResults(**results)})


class OtherFormat(UserError):
    """A checkpoint of another version of dtl: it is complete, so it is not skipped."""


def check_format(found: int, what: str) -> None:
    """UserError where `what` (a path, or a name) has the format of another version of dtl."""
    if found > FORMAT:
        raise OtherFormat(f"{what} was written by a newer dtl (checkpoint format {found}, this dtl reads {FORMAT}): update dtl to continue this run")
    if found < FORMAT:
        raise OtherFormat(
            f"{what} was written by an older dtl (checkpoint format {found}, this dtl reads {FORMAT}): use the dtl version that started the run, or {OTHERWISE}"
        )


def _fields(cls: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the dataclass `cls`; UserError where the checkpoint has others."""
    if not isinstance(value, Mapping):
        raise UserError(f"the checkpoint's state does not fit this dtl: {cls.__name__} must be an object")
    wrong = sorted({entry.name for entry in fields(cls)}.symmetric_difference(value))
    if wrong:
        raise UserError(f"the checkpoint's state does not fit this dtl: {', '.join(wrong)} unknown or missing")
    return dict(value)


class GroupFacts(Record):
    """A parameter group: the names of its parameters, and what is set for it."""

    finite = False
    names: tuple[Text, ...]
    options: NumbersObject


class OptimizerFacts(Record):
    """What is not a tensor of an optimizer's state. `plain`: by parameter."""

    finite = False
    optimizer: Text
    groups: tuple[GroupFacts, ...]
    plain: dict[Text, NumbersObject]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as `{"exp_avg/PARAMETER": tensor}` and, as JSON, what is not a tensor.

    Each parameter group carries `names`, the dotted name of each of its parameters. Nothing is copied.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        names = _names(group)
        groups.append({"names": names, "options": _options(group)})
        for name, parameter in zip(names, group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
    return tensors, {"optimizer": _kind(optimizer), "groups": groups, "plain": plain}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Restore what `optimizer_tensors` gave, exactly, into an optimizer built from the same settings.

    Raises UserError, and leaves the optimizer as it was, where kind, names, shapes or switches (amsgrad, nesterov ...) differ.
    """
    OptimizerFacts.from_values(meta, "the checkpoint's optimizer")
    if meta["optimizer"] != _kind(optimizer):
        raise UserError(f"the checkpoint has the optimizer state of {meta['optimizer']}, but the run uses {_kind(optimizer)}")
    _check_groups(optimizer, meta["groups"])
    parameters = {name: (group, p) for group in optimizer.param_groups for name, p in zip(_names(group), group["params"], strict=True)}
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in meta["plain"].items()}
    if strangers := state.keys() - parameters.keys():
        raise UserError(f"the checkpoint has optimizer state for {min(strangers)}, which the optimizer does not train")
    for place, tensor in tensors.items():
        key, _, name = place.partition("/")
        if name not in parameters:
            raise UserError(f"the checkpoint has optimizer state for {name}, which the optimizer does not train")
        group, parameter = parameters[name]
        state.setdefault(name, {})[key] = _placed(tensor, place, key, group, parameter)
    for group, saved in zip(optimizer.param_groups, meta["groups"], strict=True):
        for key, value in saved["options"].items():
            if key in group and key not in _EXECUTION_OPTIONS:
                group[key] = tuple(value) if isinstance(value, list) else value
    optimizer.state.clear()
    for name, values in state.items():
        optimizer.state[parameters[name][1]] = values


def config_conflicts(old: Mapping[str, Any], new: Mapping[str, Any], *, ignored: Sequence[str] = ()) -> list[tuple[str, object, object]]:
    """The settings that differ between two configs, as (dotted key, old, new); a key that one of them lacks counts as None.

    `ignored` are patterns of dotted keys (`tracking.*`). The order of the keys counts for the phases only.
    """
    flat_old, flat_new = flat(old), flat(new)
    conflicts: list[tuple[str, object, object]] = []
    for key in dict.fromkeys([*flat_old, *flat_new]):
        before, after = flat_old.get(key), flat_new.get(key)
        if before != after and not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignored):
            conflicts.append((key, before, after))
    first, second = (list(config.get("phases") or {}) for config in (old, new))
    if first != second and sorted(first) == sorted(second):
        conflicts.append(("phases", first, second))
    return conflicts


def _check_groups(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    old = {name: number for number, group in enumerate(saved) for name in group["names"]}
    new = {name: number for number, group in enumerate(optimizer.param_groups) for name in _names(group)}
    if difference := sorted(old.keys() ^ new.keys()):
        name = difference[0]
        where = "the checkpoint's optimizer trained it, this one does not" if name in old else "the checkpoint's optimizer did not train it"
        raise UserError(f"the optimizer and the checkpoint have different parameters ({len(difference)} differ, the first is {name}): {where}")
    if old != new or len(saved) != len(optimizer.param_groups):
        raise UserError("the optimizer's parameter groups differ from those of the checkpoint: the parameters are the same, but grouped differently")
    for group, before in zip(optimizer.param_groups, saved, strict=True):
        for key, value in before["options"].items():
            switch = isinstance(value, bool) and key not in _EXECUTION_OPTIONS
            if key in group and key not in _EXECUTION_OPTIONS and _is_number(group[key]) != _is_number(value):
                raise UserError(f"the optimizer's {key} is {group[key]}, but {str(value)[:80]!r} in the checkpoint")
            if switch and key in group and bool(group[key]) != value:
                raise UserError(f"the optimizer's {key} is {group[key]}, but was {value} when the checkpoint was written")


def _placed(tensor: Tensor, place: str, key: str, group: Mapping[str, Any], parameter: Tensor) -> Tensor:
    """A copy where torch would keep it: like its parameter, memory layout included (another layout takes other kernels,
    whose sums may round differently); a step count on the host unless the optimizer runs fused or captured."""
    if (tensor.dim() == 0 and parameter.dim() > 0) or key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return tensor.to(parameter.device if on_device else "cpu", copy=True)
    if tensor.shape != parameter.shape:
        raise UserError(f"optimizer state {place} has shape {list(tensor.shape)} in the checkpoint, but its parameter has shape {list(parameter.shape)}")
    like = torch.empty_like(parameter, dtype=tensor.dtype, memory_format=torch.preserve_format, requires_grad=False)
    return like.copy_(tensor)


def _names(group: Mapping[str, Any]) -> list[str]:
    names = group.get("names")
    if names is None or len(names) != len(group["params"]):
        raise ValueError("each parameter group must carry `names`, one for each parameter")
    return list(names)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a group but its parameters; a lr that is a tensor becomes a number."""
    plain = {key: value for key, value in group.items() if key not in ("params", "names", "param_names")}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in plain.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def _kind(optimizer: object) -> str:
    # Accelerate's wrapper is not the optimizer.
    return type(getattr(optimizer, "optimizer", optimizer)).__name__
