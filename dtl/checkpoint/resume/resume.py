"""What a start finds of the one before it: its newest checkpoint, what may not have changed since, and what may, but is logged."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dtl.checkpoint.resume.state import OTHERWISE, OptimizerFacts, TrainState, config_conflicts
from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
from dtl.config import Config, Section, config_from_dict
from dtl.config.functions import code_sha256
from dtl.config.load import is_shipped
from dtl.data.sampling.plan import PLAN_VERSION
from dtl.data.transforms.transforms import VERSIONS
from dtl.distributed.determinism import changed_facts, kernel_facts
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.models.preprocessing import Preprocessing
from dtl.text import counted
from dtl.untrusted import Count, NumbersObject, Record, Text

# Settings that may change between two starts of one run: they do not change its result. Of these precision, data.train, data.val and data.test are
# compared by what they come to; run.device and data.micro_batch_size change roundings and batch statistics, as the number of ranks does,
# and are logged. Keys of `checkpoint` stand here one by one: `monitor` says which weights are kept.
FREE_SETTINGS = (
    "run.name", "run.dir", "run.resume", "run.debug", "run.device", "run.deterministic", "run.profile", "run.timeout_minutes", "tracking.*", "precision",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.deadline_seconds", "checkpoint.max_failures", "checkpoint.keep", "checkpoint.keep_done",
    "checkpoint.async",
    "data.workers", "data.micro_batch_size", "data.cache_dir", "data.cache_shared", "data.train", "data.val", "data.test", "data.group_check", "data.on_error",
    "data.max_bad", "data.names",
    "data.cache_gb", "data.retries", "data.timeout", "data.allow_pipe",
)  # fmt: skip


class StoredState(Record):
    """state.json, as `checkpoint_state` and the phase under way have written it."""

    finite = False  # a run's sums may be infinite
    train: NumbersObject
    config: NumbersObject
    precision: Text
    plan: int
    device: Text | None = None
    kernels: dict[Text, Text] = field(default_factory=dict)
    transforms: dict[Text, int] = field(default_factory=dict)
    functions: dict[Text, Text] = field(default_factory=dict)
    preprocessing: NumbersObject | None = None
    """What `dtl.models.preprocessing` came to; None of an older dtl."""
    optimizer: OptimizerFacts
    scaler: dict[Text, float] | None
    ema_updates: Count | None


def _groups_needed(checkpoint: Checkpoint) -> set[str]:
    return {"model", "optimizer"} | ({"ema"} if checkpoint.state["ema_updates"] is not None else set())


def find_checkpoint(config: Config, store: CheckpointStore, runtime: Runtime, datasets: dict[str, str]) -> tuple[Checkpoint | None, TrainState]:
    """The newest whole checkpoint and the state in it; a fresh state without one. Changed settings are refused by name. `datasets`: dataset ids by split."""
    with runtime.together("resume"):
        newest = store.newest() if runtime.is_main and config.run.resume != "never" else None
    # The main process has checked the hashes; the others need not read everything twice.
    step = runtime.agree(None if newest is None else newest.step)
    with runtime.together("resume"):
        checkpoint = newest if runtime.is_main or step is None else store.at(step)
        if checkpoint is None:
            if config.run.resume == "must":
                raise UserError(f"run.resume is must, but {store.folder} contains no complete checkpoint")
            state = TrainState(dataset_ids=datasets)
        else:
            StoredState.from_values(checkpoint.state, f"{checkpoint.path}/state.json")
            if missing := _groups_needed(checkpoint) - set(checkpoint.groups):
                raise UserError(f"{checkpoint.path} is incomplete: it has no {min(missing)}.safetensors, which its state.json requires; {OTHERWISE}")
            state = TrainState.from_json(checkpoint.state["train"])
            _check_settings(config, checkpoint, store.folder.parent, other_images=state.dataset_ids.get("train") != datasets.get("train"))
            _check_data(config, state, datasets, store.folder.parent)
            _check_precision(str(checkpoint.state["precision"]), runtime.precision)
            check_transforms(checkpoint.state, store.folder.parent)
            check_plan(checkpoint.state, store.folder.parent)
    return checkpoint, state


def checkpoint_state(config: Config, state: TrainState, runtime: Runtime, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a checkpoint stores for `find_checkpoint`: the state, and all that a resume compares."""
    return {
        "train": state.to_json(),
        "config": config.to_dict(),
        "precision": runtime.precision,
        "device": runtime.device.type,
        "kernels": kernel_facts(config.run.deterministic, runtime.device),
        "transforms": VERSIONS,
        "functions": _functions(config),
        "plan": PLAN_VERSION,
        "preprocessing": {**preprocessing.to_json(), "origins": dict(preprocessing.origins)},
    }


def _functions(config: Config) -> dict[str, str]:
    """Key -> SHA-256 of the code of the user's own function that it names, for data."""
    name = config.data.augment.function
    return {} if name is None else {"data.augment.function": _code_of(name)}


@cache
def _code_of(name: str) -> str:
    """As it was when this process first asked, at the start of the run."""
    return code_sha256(name, "data.augment.function")


def note_changes(config: Config, checkpoint: Checkpoint | None, state: TrainState, runtime: Runtime, log: Callable[[str], None]) -> None:
    """Log what has changed since the last start and may change; then the state takes this start's facts."""
    threads, functions = torch.get_num_threads(), _functions(config)
    if checkpoint is not None:
        if state.world_size != runtime.world_size:
            log(
                f"this run used {counted(state.world_size, 'process')} and now uses {runtime.world_size}: the samples of each global batch stay the same; "
                "batch norm statistics and the rounding of sums may differ"
            )
        elif state.num_threads != threads:
            log(f"this run used {counted(state.num_threads, 'thread')} per process and now uses {threads}: the rounding of sums may differ")
        device = checkpoint.state.get("device", runtime.device.type)  # an older dtl did not write it
        if device != runtime.device.type:
            log(f"this run was on {device} and is now on {runtime.device.type}: the rounding of sums may differ")
        for line in changed_facts(checkpoint.state.get("kernels", {}), kernel_facts(config.run.deterministic, runtime.device)):
            log(line)
        for key, code in functions.items():
            if checkpoint.state.get("functions", {}).get(key) != code:
                log(f"warning: the file of {key} has changed since the checkpoint: from here on it may change an image otherwise")
        before, now = checkpoint.state["config"].get("data", {}).get("micro_batch_size", "auto"), config.data.micro_batch_size
        if before != now:
            log(
                f"data.micro_batch_size was {before} and is now {now}: the samples of each global batch stay the same; batch norm statistics, "
                "dropout and the rounding of sums may differ"
            )
    state.world_size, state.num_threads = runtime.world_size, threads


def check_transforms(state: dict[str, Any], run: Path) -> None:
    """The same sample must give the same pixels, in training and in evaluation. `state`: a checkpoint's."""
    for split, before in state.get("transforms", {}).items():  # an older dtl did not write them
        now = VERSIONS.get(split)
        if before != now:
            raise UserError(
                f"{run} was started with version {before} of the {split} transforms, but this dtl has version {now}, which gives different "
                f"pixels; resume with the dtl version that started it, or {OTHERWISE}"
            )


def check_plan(state: dict[str, Any], run: Path) -> None:
    """The same position must give the same sample: with another order an epoch would see some samples twice and others never."""
    before = state["plan"]
    if before != PLAN_VERSION:
        raise UserError(
            f"{run} was started with version {before} of the order of samples, but this dtl has version {PLAN_VERSION}: the rest of the epoch would have "
            f"different samples; resume with the dtl version that started it, or {OTHERWISE}"
        )


def _check_settings(config: Config, checkpoint: Checkpoint, run: Path, *, other_images: bool = False) -> None:
    old = config_from_dict(checkpoint.state["config"], str(checkpoint.path)).to_dict()
    new = config.to_dict()
    last = list(config.phases)[-1]
    lengths = f"phases.{last}.epochs", f"phases.{last}.steps"
    free = (*FREE_SETTINGS, *(lengths if any(_given(config, key) for key in lengths) else ()))  # a recipe of dtl may have changed its own
    if other_images and not _given(config, "data.global_batch_size"):
        free = (*free, "data.global_batch_size")  # it follows from their number, and `_check_data` names the cause
    conflicts = config_conflicts(old, new, ignored=free)
    if conflicts:
        name, before, after = conflicts[0]
        more = f" (and {len(conflicts) - 1} more settings)" if len(conflicts) > 1 else ""
        defaults = [f"--{key} {_option(old)}" for key, old, _ in conflicts if old is not None and not _given(config, key)]
        is_default = before is not None and not _given(config, name)
        unasked = f", its default, which may have changed: go on with {' '.join(defaults)}" if is_default else ""
        raise UserError(f"{run} was started with {name} {_shown(before)}, now it is {_shown(after)}{unasked}{more}; {OTHERWISE}")


def _check_data(config: Config, state: TrainState, now: dict[str, str], run: Path) -> None:
    for split, dataset_id in now.items():
        # A test set may be added: it changes nothing of what is trained.
        if state.dataset_ids.setdefault(split, dataset_id if split == "test" else "") != dataset_id:
            if state.dataset_ids.get("val") == now.get("test"):
                raise UserError(
                    f"{run} was started by a dtl that validated on the test images of data.train: to resume it, name them as data.val "
                    f"(--data.val {config.data.train}), and none is a test set; or {OTHERWISE}"
                )
            audit = "" if config.data.audit is None else f", or the decisions in data.audit {config.data.audit}"
            raise UserError(f"{run} was started with different {split} images (data.{split} has changed{audit}); {OTHERWISE}")


def _check_precision(before: str, now: str) -> None:
    if now not in (before, "auto"):  # auto: not decided here, in a dry run
        raise UserError(f"this run was started with precision {before}, but would now use {now}; resume with --precision {before}")


def _given(config: Config, name: str) -> bool:
    """Whether the user's recipe or an option sets the value of a dotted key; otherwise it is a default, of dtl or of one of its recipes."""
    if is_shipped(config, name):
        return False
    value: Any = config
    for key in name.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif not isinstance(value, Section):
            return True
        else:
            field = next((field for field, info in type(value).model_fields.items() if key in (field, info.alias)), key)
            if field not in value.model_fields_set:
                return False
            value = getattr(value, field)
    return True


def _option(value: object) -> str:
    """As a shell takes it."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)
