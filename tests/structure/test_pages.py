"""What the pages say in passing holds too: options and commands inside sentences, recipes in YAML blocks, Python blocks, no page unlinked."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml
from pages import PAGES, blocks, help_of

from dtl.commands import COMMANDS
from dtl.config import load_config
from dtl.config.help import sections

ROOT = Path(__file__).resolve().parents[2]
KEYS = {name.replace("phases.NAME", "phases.all") for _, rows in sections() for name, *_ in rows}
PUBLISHED = {"configs/swin/swin_base_patch4_window7_224_22kto1k_finetune.yaml"}
"""Files of other people's repositories."""
# Spans in sentences; configuration.md is made from the keys themselves.
TEXTS = {page: re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in PAGES if page.name != "configuration.md"}


def spans() -> list[tuple[str, str]]:
    return [(page.name, span) for page, text in TEXTS.items() for span in re.findall(r"`([^`\n]+)`", text)]


def is_key(option: str) -> bool:
    name = re.sub(r"^phases\.\w+\.", "phases.all.", option.lstrip("-").split("=")[0].replace("-", "_"))
    return name in KEYS or name == "config" or any(key.startswith(f"{name}.") for key in KEYS)


def test_there_are_some() -> None:
    assert len(spans()) > 200
    assert len(KEYS) > 60


@pytest.mark.parametrize(("page", "span"), [entry for entry in spans() if re.match(r"--\w+\.[\w.-]+", entry[1])])
def test_an_option_in_a_sentence_is_a_key(page: str, span: str) -> None:
    for word in shlex.split(span):
        if re.match(r"--\w+\.[\w.-]+", word):
            assert is_key(word), f"{page}: {word}"


@pytest.mark.parametrize(("page", "span"), [entry for entry in spans() if re.match(r"dtl [a-z-]+( |$)", entry[1])])
def test_a_command_in_a_sentence_exists(page: str, span: str) -> None:
    command, *rest = shlex.split(span)[1:]
    assert command in COMMANDS or command == "COMMAND", f"{page}: {span}"
    for word in rest:
        if word.startswith("--") and command in COMMANDS:
            known = word.split("=")[0]
            assert known in help_of(command) or (command in ("train", "find-lr") and is_key(word)), f"{page}: {span}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_yaml_blocks_with_phases_are_recipes(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "phases" in values:
            file = tmp_path / "page.yaml"
            file.write_text(yaml.safe_dump({"data": {"train": "a", "val": "b"}, **values}, sort_keys=False))
            load_config(["--config", str(file)])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_are_python_and_name_what_exists(page: Path) -> None:
    import dtl

    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dtl":
                assert node.attr in dtl.__all__, f"{page.name}: dtl.{node.attr}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{page.name}" in readme, f"README.md does not lead to docs/{page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(r"(?<![\w/.-])(?:dtl|tests|benchmarks|configs|launch|sweeps)/[\w/-]+\.(?:py|yaml|md|json)\b", text)
    files += [module.replace(".", "/") + ".py" for module in re.findall(r"(?<![\w/.-])benchmarks\.[a-z_]\w*", text)]
    missing = {file for file in files if not re.search("[A-Z]{3}", file) and not (ROOT / file).exists() and not (ROOT / file).with_suffix("").is_dir()}
    assert missing - PUBLISHED == set()
