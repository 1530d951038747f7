"""Every file that is shipped for users is valid, and the built-in recipes are those of configs/."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from model_folders import bottleneck_names

from dtl.config import builtin_recipes, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MAPS = sorted((ROOT / "configs/maps").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "launch").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {file.stem for file in CONFIGS} >= {
        "digits", "finetune", "features", "cifar10_features", "cifar10_finetune", "ants_bees_features", "ants_bees_finetune", "flowers102",
        "flowers102_two_phase", "rotnet_cifar10", "rotnet_pretext", "supervised_cifar10", "transfer_by_order", "transfer_by_map", "top_layers",
        "head_and_backbone_lr", "dinov2",
    }  # fmt: skip
    assert MAPS
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


def header_commands() -> list[tuple[str, str]]:
    found = []
    for file in CONFIGS:
        comment = "\n".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
        found += [(file.name, line) for line in comment.replace("\\\n", " ").splitlines() if line.startswith("accelerate launch dtl/train.py")]
    return found


@pytest.mark.parametrize(("file", "line"), header_commands())
def test_the_command_of_a_header_is_one(file: str, line: str) -> None:
    words = shlex.split(line)[3:]
    if words:
        assert (ROOT / words[words.index("--config") + 1]).is_file()
        words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
        load_config(words)


@pytest.mark.parametrize("file", MAPS, ids=lambda file: file.name)
def test_a_map_is_readable(file: Path) -> None:
    from dtl.checkpoint.transfer.match.by_map import read_rules

    assert len(read_rules(file)) > 5


def test_the_map_of_mobilenet_v2_pairs_what_the_order_pairs() -> None:
    """The names of the weights that the recipes read, made from torchvision's by the order in which both are registered."""
    from dtl.checkpoint import plan_transfer
    from dtl.models.build import build

    target = build("torchvision/mobilenet_v2", num_classes=2, meta=True).module
    source = bottleneck_names(target.state_dict())
    by_map = plan_transfer(source, target, by="map", mapping=ROOT / "configs/maps/mobilenet_v2.yaml")
    by_order = plan_transfer(source, target, by="order")
    assert by_map.ok, by_map.refusals
    assert by_map.pairs == by_order.pairs
    assert len(by_map.pairs) == 312


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
    from dtl.config.help import FOOTER, HEADER, reference

    assert (ROOT / "docs/configuration.md").read_text() == f"{HEADER}\n{reference().rstrip()}\n{FOOTER}"
