"""The shape of the package: imports go down, rooms stay narrow, files and functions readable, tests lie beside what they test."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import pytest
from harness import run

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dtl"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each room may import those above it in this list; the rooms of one line do not import each other.
LAYERS: list[set[str]] = [
    {"version", "errors", "text", "keyed", "files", "machine", "credentials", "pickles", "untrusted", "intervals", "reading", "imports"},
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
    {"api"},
    {"cli", "train", "__main__", "__init__", "checkpoint"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
BASE = LAYERS[0]
# Modules of the base are small and use each other; the first ones are for everybody.
WIDEST_FOLDER, WIDE = 16, {"commands"}  # one module a command
LONGEST_FILE, LONGEST_FUNCTION = 600, 80
SMALL = 120
# Small modules that one sibling alone imports, each with the reason why it is one of its own.
ON_ITS_OWN = {"dtl.models.plain_resnet": "a network, and the only one that dtl defines: people look for it by its name"}
# Tests in tests/unit that belong to no single module.
OF_THE_WHOLE = {"test_benchmarks"}
# Modules without a test file of their name, each with the reason.
WITHOUT_TESTS = {
    "dtl.__main__": "calls dtl.cli, which test_cli has",
    "dtl.train": "a script that calls dtl.cli, started by tests/distributed/test_launchers.py",
    "dtl.version": "one number and no logic at all",
    "dtl.commands.train": "every test that starts a run goes by it (tests/harness.py)",
    "dtl.data.verify_tasks": "the work of dtl.data.verify, whose test_verify damages shards in every way",
}
# How many files of dtl one has to open to follow one of these (tests/structure/files_opened.py).
OPENED = {"step": 16, "sample": 9, "resume": 25, "load": 14}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def room_of(module: str) -> str:
    """`dtl.data.sampling.plan` belongs to `data`, `dtl.checkpoint.resume.store` to `checkpoint.resume`."""
    names = module.split(".")[1:]
    if not names:
        return "__init__"
    return ".".join(names[:2]) if names[0] == "checkpoint" else names[0]


@lru_cache
def imports() -> dict[str, dict[str, int]]:
    """Module -> the modules of dtl that it imports, anywhere in it, and the line."""
    found: dict[str, dict[str, int]] = {}
    for module, file in MODULES.items():
        names: dict[str, int] = {}
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.setdefault(whole if whole in MODULES else str(node.module), node.lineno)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    names.setdefault(alias.name, node.lineno)
        found[module] = {name: line for name, line in names.items() if name in MODULES and name != module}
    return found


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = [stack.pop()]
            while component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 50
    assert circles({"a": {"b": 1}, "b": {"c": 1}, "c": {"b": 2}}) == [["b", "c"]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    own = room_of(module)
    assert own in LAYER_OF, f"{module}: which layer does {own} belong to?"
    for other, line in imports()[module].items():
        room = room_of(other)
        assert other != "dtl.train", f"{module}:{line}: dtl.train is a script, it would exist twice"
        same = room == own or own in ("cli", "__main__", "train", "__init__", "checkpoint")
        assert same or LAYER_OF[room] < LAYER_OF[own] or {own, room} <= BASE, f"{module}:{line} imports {other}: {own} may not know {room}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles(imports()) == []


def test_folders_stay_narrow() -> None:
    folders = Counter(str(file.parent.relative_to(PACKAGE)) for file in FILES if file.name != "__init__.py")
    assert {folder: number for folder, number in folders.items() if number > WIDEST_FOLDER and folder not in WIDE} == {}


def test_no_chips_of_files() -> None:
    """A small module that a single sibling imports is a part of that sibling."""
    users = defaultdict(set)
    for module, names in imports().items():
        for name in names:
            users[name].add(module)
    chips = {}
    for module, file in MODULES.items():
        if file.name == "__init__.py" or len(users[module]) != 1:
            continue
        (user,) = users[module]
        lines = len(file.read_text().splitlines())
        if lines < SMALL and user.rpartition(".")[0] == module.rpartition(".")[0]:
            chips[module] = f"{lines} lines, imported by {user} alone"
    assert {module: why for module, why in chips.items() if module not in ON_ITS_OWN} == {}
    assert set(ON_ITS_OWN) <= set(chips), "an exception that is none any more"


def test_files_and_functions_stay_readable() -> None:
    long_files = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert {module: lines for module, lines in long_files.items() if lines > LONGEST_FILE} == {}
    functions = {}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{module}.{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    assert {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION} == {}


def test_exceptions_are_few() -> None:
    assert len(ON_ITS_OWN) + len(WIDE) + len(OF_THE_WHOLE) + len(WITHOUT_TESTS) <= 10
    assert all(len(why.split()) > 3 for why in [*ON_ITS_OWN.values(), *WITHOUT_TESTS.values()])


def test_unit_tests_lie_where_the_module_lies() -> None:
    """tests/unit/data/sampling/test_plan.py, and test_plan_scale.py, are about dtl/data/sampling/plan.py."""
    astray = []
    for file in sorted((ROOT / "tests/unit").rglob("*.py")):
        folder = PACKAGE / file.parent.relative_to(ROOT / "tests/unit")
        names = {module.stem for module in folder.glob("*.py")} - {"__init__"} if folder.is_dir() else set()
        named = file.stem.removeprefix("test_")
        if file.stem != "conftest" and file.stem not in OF_THE_WHOLE and not any(named == name or named.startswith(f"{name}_") for name in names):
            astray.append(str(file.relative_to(ROOT)))
    assert astray == []


def test_every_module_has_its_test_file() -> None:
    """dtl/data/sampling/plan.py has tests/unit/data/sampling/test_plan.py, which has a test in it. An `__init__.py` has no logic."""
    missing = set()
    for module, file in MODULES.items():
        tests = ROOT / "tests/unit" / file.parent.relative_to(PACKAGE) / f"test_{file.stem}.py"
        if file.name != "__init__.py" and not (tests.is_file() and "def test_" in tests.read_text()):
            missing.add(module)
    assert missing == set(WITHOUT_TESTS)


@pytest.mark.parametrize("what", sorted(OPENED))
def test_few_files_are_opened(tmp_path: Path, what: str) -> None:
    """The number stands in docs/architecture.md, for whoever is about to read them."""
    files = json.loads(run([what], cwd=tmp_path, command="files_opened:main", device="cpu").out())
    assert len(files) > 5
    assert len(files) <= OPENED[what], "\n".join(files)
    page = (ROOT / "docs/architecture.md").read_text()
    assert re.search(rf"\| one {what}\b[^|]*\| {len(files)} \|", page), f"docs/architecture.md: | one {what} ... | {len(files)} |"


def test_no_module_shadows_another_when_the_script_is_run_as_a_file() -> None:
    """`accelerate launch dtl/train.py` puts dtl/ first on sys.path until the script's first lines take it away."""
    installed = set(importlib.metadata.packages_distributions()) - {"dtl", "tests"}
    for path in PACKAGE.iterdir():
        name = path.stem if path.suffix == ".py" else path.name
        assert name not in sys.stdlib_module_names, name
        assert name not in installed or name.startswith("__"), name


def test_importing_dtl_and_its_config_needs_no_torch() -> None:
    code = "import sys, dtl, dtl.config, dtl.cli, dtl.errors, dtl.files, dtl.machine, dtl.runs.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_is_unpickled() -> None:
    """Files are read by dtl.pickles; processes of torch's own loaders exchange pickles among themselves."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("torch.load", "torch.jit.load", "pickle.load", "pickle.loads"), f"{file}:{node.lineno}: {ast.unparse(node)}"
                assert "Unpickler" not in name, f"{file}:{node.lineno}: {ast.unparse(node)}"
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{file}:{node.lineno}: {ast.unparse(node)}"


def test_settings_travel_as_types() -> None:
    """No options that a type checker cannot see, and no object made by skipping `__init__` (docs/architecture.md)."""
    found = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None and node.args.kwarg.arg == "options":
                found.append(f"{module}:{node.lineno}: **{node.args.kwarg.arg}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".__new__", "object.__new__")):
                found.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
