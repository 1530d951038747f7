"""Each sweep file gives commands that `dtl train` takes, with every trial in a run folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dtl.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def sample(parameter: dict[str, Any]) -> Any:
    return parameter["values"][0] if "values" in parameter else parameter["min"]


def test_there_are_some() -> None:
    assert SWEEPS


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_a_trial_is_a_valid_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    sweep = yaml.safe_load(file.read_text())
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"]["name"] == "val/top1"
    # As wandb's agent fills the command: one --name=value a parameter.
    arguments = [f"--{name}={sample(parameter)}" for name, parameter in sweep["parameters"].items()]
    words = [word for part in sweep["command"] for word in (arguments if part == "${args}" else [part])]
    config, name = load_config(words[words.index("${program}") + 1 :])
    assert name == f"{Path(words[words.index('--config') + 1]).stem}-trial7"
    assert config.phases["all"].lr == sweep["parameters"]["phases.all.lr"]["min"]
