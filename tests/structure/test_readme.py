"""What the README and the docs tell people to type exists: commands, options, files, keys. CI runs the README's own test command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import PAGES, blocks, help_of, lines_of

from dtl.commands import COMMANDS
from dtl.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def command_lines() -> list[tuple[str, str]]:
    """(page, command) of every line of every bash block."""
    return [(page.name, line) for page in PAGES for block in blocks(page, "bash") for line in lines_of(block)]


LINES = command_lines()


def test_there_are_some() -> None:
    assert len(LINES) > 15
    commands = {line.split()[0] for _, line in LINES}
    assert {"accelerate", "dtl", "sbatch", "pytest"} <= commands


@pytest.mark.parametrize(("page", "line"), [entry for entry in LINES if "dtl/train.py" in entry[1] or entry[1].startswith("dtl train")])
def test_a_training_command_parses(page: str, line: str) -> None:
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word in ("dtl/train.py", "train"))
    arguments = [word if word != "..." else "" for word in words[start + 1 :]]
    arguments = [word for word in arguments if word]
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        assert (ROOT / arguments[place]).exists() or arguments[place] in ("finetune", "features", "digits"), f"{page}: {arguments[place]}"
        if (ROOT / arguments[place]).exists():
            arguments[place] = str(ROOT / arguments[place])
    load_config([word for word in arguments if word not in ("--print-config", "--help", "--dry-run")])
    for i, word in enumerate(words):
        if word == "--config_file":
            assert (ROOT / words[i + 1]).exists(), f"{page}: {words[i + 1]}"


@pytest.mark.parametrize(("page", "line"), [entry for entry in LINES if re.match(r"dtl (?!train)\w", entry[1])])
def test_a_command_and_its_options_exist(page: str, line: str) -> None:
    words = shlex.split(line)
    assert words[1] in COMMANDS or words[1].startswith("-"), f"{page}: dtl {words[1]}"
    if words[1] in COMMANDS:
        known = help_of(words[1]) + (help_of("train") if words[1] in ("find-lr", "verify-resume", "transfer", "search") else "")
        for word in words[2:]:
            if word.startswith("--"):
                name = re.sub(r"^--phases\.\w+\.", "--phases.NAME.", word.split("=")[0])
                assert name in known or name.replace("-", "_").replace("__", "--", 1) in known, f"{page}: dtl {words[1]} has no {word}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_help_without_heavy_imports(command: str) -> None:
    lines = ["import sys", f"sys.argv = ['dtl', '{command}', '--help']", "from dtl.cli import main", "try: main()", "except SystemExit: pass"]
    code = "\n".join([*lines, "sys.exit(' '.join({'torch', 'numpy', 'accelerate'} & set(sys.modules)) or 0)"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"dtl {command} --help imports {done.stderr}"
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize(("page", "line"), [entry for entry in LINES if entry[1].startswith("sbatch ")])
def test_an_sbatch_file_and_its_config_exist(page: str, line: str) -> None:
    for word in shlex.split(line)[1:]:
        if word.endswith((".sbatch", ".yaml")) and "/" in word:
            assert (ROOT / word).exists(), f"{page}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_yaml_in_the_readme_is_a_valid_recipe(tmp_path: Path) -> None:
    found = [yaml.safe_load(block) for block in blocks(ROOT / "README.md", "yaml")]
    assert found
    for values in found:
        file = tmp_path / "readme.yaml"
        file.write_text(yaml.safe_dump({"data": {"train": "a", "val": "b"}} | values))
        load_config(["--config", str(file)])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    command = text.split("<!-- the test command -->")[1].split("```bash\n")[1].split("\n```")[0]
    assert "pytest" in command
    assert "\n" not in command
    assert "<!-- the test command -->" in (ROOT / ".ci/run").read_text()
