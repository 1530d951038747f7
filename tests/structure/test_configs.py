"""Every file that is shipped for users is valid, and the built-in recipes are those of configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dtl.config import builtin_recipes, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LAUNCHES = sorted((ROOT / "launch").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {file.name for file in CONFIGS} >= {"digits.yaml", "finetune.yaml", "features.yaml"}
    assert {file.stem for file in LAUNCHES} >= {"cpu", "cpu_2", "gpu", "gpus", "nodes"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_valid_and_says_how_to_run_it(file: Path) -> None:
    text = file.read_text()
    given = [] if "train:" in text.split("phases:")[0] else ["--data.train", "somewhere", "--data.val", "elsewhere"]
    config, name = load_config(["--config", str(file), *given])
    assert config.phases
    assert name == file.stem
    assert text.startswith("#"), "a recipe begins with what it is for"
    assert "accelerate launch dtl/train.py" in text


def test_the_builtin_recipes_are_those_of_configs() -> None:
    builtin = builtin_recipes()
    assert len(builtin) >= 3
    for name, text in builtin.items():
        assert (ROOT / "configs" / f"{name}.yaml").read_text() == text, name


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.name)
def test_a_launch_file_is_one_that_accelerate_takes(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(file.read_text())
    config = load_config_from_file(str(file))
    assert config.num_processes == values["num_processes"]
    assert f"--config_file launch/{file.name}" in file.read_text()
    for line in file.read_text().splitlines():
        assert len(line) < 160


def test_the_configuration_page_is_made_from_the_models() -> None:
    from dtl.config_help import HEADER, reference

    assert (ROOT / "docs/configuration.md").read_text() == f"{HEADER}\n{reference().rstrip()}\n"
