"""The shape of the package: imports go one way, nothing shadows another package, files and functions stay readable."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dtl"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each layer may import those before it; the rooms of one layer do not import each other.
LAYERS: list[set[str]] = [
    {"errors", "text", "keyed", "files", "machine", "version"},
    {"config"},
    {"data", "models", "optim"},
    {"checkpoint.transfer"},
    {"distributed"},
    {"runs"},
    {"checkpoint.resume"},
    {"training"},
    {"checks", "doctor"},
    {"inference", "report"},
    {"commands"},
    {"api", "cli", "__main__", "train", "checkpoint"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# Arrows that still run the wrong way; each goes with the next changes.
NOT_YET: set[tuple[str, str]] = set()
LONGEST_FILE = 600
LONGEST_FUNCTION = 80


def part_of(module: str) -> str:
    """`dtl.data.sampling.plan` belongs to `data`, `dtl.checkpoint.resume.store` to `checkpoint.resume`."""
    names = module.split(".")[1:]
    if not names:
        return "__init__"
    return ".".join(names[:2]) if names[0] == "checkpoint" else names[0]


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_one_way(file: Path) -> None:
    own = part_of(module_name(file))
    if own in ("__init__", "checkpoint.__init__"):
        return
    assert own in LAYER_OF, f"{file}: which layer does {own} belong to?"
    for module, line in imports_of(file):
        if not module.startswith("dtl") or module == "dtl":
            continue
        other = part_of(module)
        assert module != "dtl.train", f"{file}:{line}: dtl.train is a script, it would exist twice"
        same = other == own
        lower = LAYER_OF.get(other, 99) < LAYER_OF[own]
        shared = LAYER_OF[own] in (0, len(LAYERS) - 1) and LAYER_OF.get(other, 99) == LAYER_OF[own]
        assert same or lower or shared or (own, other) in NOT_YET, f"{file}:{line}: {own} (layer {LAYER_OF[own]}) imports {other}"


def test_no_module_shadows_another_when_the_script_is_run_as_a_file() -> None:
    """`accelerate launch dtl/train.py` puts dtl/ first on sys.path until the script's first lines take it away."""
    installed = {name for names in importlib.metadata.packages_distributions() for name in [names]} - {"dtl", "tests"}
    for path in PACKAGE.iterdir():
        name = path.stem if path.suffix == ".py" else path.name
        assert name not in sys.stdlib_module_names, name
        assert name not in installed or name.startswith("__"), name


def test_files_and_functions_stay_readable() -> None:
    long_files = {module_name(file): len(file.read_text().splitlines()) for file in FILES}
    outliers = {name: lines for name, lines in long_files.items() if lines > LONGEST_FILE}
    assert not outliers, f"files over {LONGEST_FILE} lines: {outliers}"
    functions = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                functions[f"{module_name(file)}.{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    outliers = {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION}
    assert not outliers, f"functions over {LONGEST_FUNCTION} lines: {outliers}"


def test_importing_dtl_and_its_config_needs_no_torch() -> None:
    import subprocess

    code = "import sys, dtl, dtl.config, dtl.cli, dtl.errors, dtl.runs.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_is_unpickled_that_could_run_code() -> None:
    found = 0
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                found += 1
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
                assert safe == "True", f"{file}:{node.lineno}: {ast.unparse(node)}"
    assert found
