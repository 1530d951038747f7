"""Settings by the network's family (families.yaml): what `optimizer: auto` stands for, in the phases that have it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from dtl.untrusted import read_yaml

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


def fill_by_family(values: dict[str, Any], names: Iterable[str], *, model: str, global_batch_size: int, given: Collection[str]) -> tuple[str, ...]:
    """Put the settings of the network's family into these phases, where they have none of their own; a line for each phase.

    A phase with an optimizer of another kind than the family's (`--phases.all.optimizer sgd`) gets the other settings of the last row.
    `given`: options of the network that were given.
    """
    lines, found = [], family_of(model)
    for name in names:
        phase = values["phases"].get(name)
        if not isinstance(phase, dict):
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
        if not taken:
            continue
        shown = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in taken.items())
        why = "" if row.measured else "; not measured with dtl"
        lines.append(f"phase {name}: {shown}, as for {row.family} networks ({row.source}{why})")
    return tuple(lines)
