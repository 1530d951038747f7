"""`auto` in a recipe: settings of a phase by the network's family (`optimizer`), samples per step by the number of training images
(`data.global_batch_size`)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dtl.config.models import Config, DataConfig, ModelConfig
from dtl.text import counted
from dtl.untrusted import read_yaml

# ---- samples per step

BATCH_SIZES, STEPS_AIMED_AT = (64, 32, 16), 20
"""Measured on the choosing sets of benchmarks/judging.py (docs/results.md)."""


def batch_size_of(data: DataConfig, images: int) -> int:
    """`data.global_batch_size` for so many training images. auto: the largest of BATCH_SIZES that makes an epoch of at least STEPS_AIMED_AT steps, else the
    smallest; but not smaller than a micro-batch."""
    if data.global_batch_size != "auto":
        return data.global_batch_size
    size = next((size for size in BATCH_SIZES if images >= size * STEPS_AIMED_AT), BATCH_SIZES[-1])
    return size if data.micro_batch_size == "auto" else max(size, data.micro_batch_size)


def epoch_steps(data: DataConfig, images: int) -> int:
    """Optimizer steps of an epoch of so many training images."""
    size = batch_size_of(data, images)
    return max(1, images // size if data.last == "drop" else -(-images // size))


def with_batch_size(config: Config, images: int) -> Config:
    """`config` with the number that `data.global_batch_size: auto` means for so many training images, the families' learning rates for it, and a note."""
    data, size = config.data, batch_size_of(config.data, images)
    if data.global_batch_size != "auto":
        return config
    filled = [note.for_batches(size) if isinstance(note, ByFamily) else note for note in config._notes]
    rates = {note.phase: note.taken["lr"] for note in filled if isinstance(note, ByFamily) and "lr" in note.taken}
    phases = {name: phase.model_copy(update={"lr": rates[name]}) if name in rates else phase for name, phase in config.phases.items()}
    made = config.model_copy(update={"data": data.model_copy(update={"global_batch_size": size}), "phases": phases})
    made._notes = (*filled, f"data.global_batch_size auto: {size}, which is {counted(epoch_steps(data, images), 'step')} an epoch")
    return made


# ---- settings of a phase

TABLE = Path(__file__).with_name("families.yaml")
_FILLED = ("optimizer", "lr", "weight_decay", "layer_decay")


class Family(BaseModel):
    """A row of families.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: str
    networks: tuple[str, ...]
    optimizer: Literal["sgd", "adamw"]
    lr: float
    batch: int
    scale: Literal["linear", "sqrt", "none"]
    weight_decay: float
    layer_decay: float
    drop_path: float
    measured: bool
    source: str

    def lr_of(self, global_batch_size: int) -> float:
        """For a global batch of this size, in three digits."""
        ratio = global_batch_size / self.batch
        return float(f"{self.lr * {'linear': ratio, 'sqrt': math.sqrt(ratio), 'none': 1.0}[self.scale]:.3g}")


@cache
def families() -> tuple[Family, ...]:
    return tuple(TypeAdapter(list[Family]).validate_python(read_yaml(TABLE)))


def family_of(model: str) -> Family:
    """By the name of a network, with or without its library; the last row is for all others."""
    short = model.rpartition("/")[2].lower()
    return next(row for row in families() if any(fnmatch.fnmatchcase(short, pattern) for pattern in row.networks))


def phases_by_family(values: Mapping[str, Any]) -> list[str]:
    """The phases of a recipe that say `optimizer: auto`."""
    phases = values.get("phases")
    return [name for name, phase in phases.items() if isinstance(phase, dict) and phase.get("optimizer") == "auto"] if isinstance(phases, dict) else []


@dataclass(frozen=True)
class ByFamily:
    """What a phase took from its network's family; as text, the line about it."""

    phase: str
    row: Family
    taken: Mapping[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.taken.items())
        why = "" if self.row.measured else "; not measured with dtl"
        return f"phase {self.phase}: {shown}, as for {self.row.family} networks ({self.row.source}{why})"

    def for_batches(self, size: int) -> ByFamily:
        return replace(self, taken={**self.taken, "lr": self.row.lr_of(size)}) if "lr" in self.taken else self


def fill_by_family(values: dict[str, Any], names: Iterable[str], *, model: str, global_batch_size: int, given: Collection[str]) -> tuple[ByFamily, ...]:
    """Put the settings of the network's family into these phases, where they have none of their own; what each phase took.

    A phase with an optimizer of another kind than the family's (`--phases.all.optimizer sgd`) gets the other settings of the last row.
    `given`: options of the network that were given.
    """
    filled, found = [], family_of(model)
    for name in names:
        phase = values["phases"].get(name)
        if not isinstance(phase, dict) or phase.get("optimizer") == "solve":
            continue
        own = phase.get("optimizer") not in ("auto", None, found.optimizer)
        row = families()[-1] if own else found
        settings: dict[str, Any] = {**row.model_dump(include=set(_FILLED)), "lr": row.lr_of(global_batch_size)}
        if phase.get("optimizer") in ("auto", None):
            phase.pop("optimizer", None)
        taken = {key: value for key, value in settings.items() if phase.get(key) is None}
        phase.update(taken)
        if not own and row.drop_path and model.startswith("timm/") and "drop_path_rate" not in given:
            values.setdefault("model", {}).setdefault("options", {}).setdefault("drop_path_rate", row.drop_path)
            taken["drop_path_rate"] = row.drop_path
        if taken:
            filled.append(ByFamily(name, row, taken))
    return tuple(filled)


def fill(values: dict[str, Any], names: Iterable[str]) -> tuple[ByFamily, ...]:
    """`optimizer: auto` in a recipe's values; those of wrong types are left to validation."""
    model, data, phases = values.get("model") or {}, values.get("data") or {}, values.get("phases")
    if not (isinstance(model, dict) and isinstance(data, dict) and isinstance(phases, dict)):
        return ()
    name, batch, options = model.get("name", ModelConfig().name), data.get("global_batch_size", DataConfig().global_batch_size), model.get("options") or {}
    batch = BATCH_SIZES[0] if batch == "auto" else batch
    try:
        batch = TypeAdapter(int).validate_python(batch)  # as the config takes it: "16" and 16.0, too
    except ValidationError:
        return ()
    if not (isinstance(name, str) and batch > 0 and isinstance(options, dict)):
        return ()
    return fill_by_family(values, names, model=name, global_batch_size=batch, given=options)
