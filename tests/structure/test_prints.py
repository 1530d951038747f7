"""What dtl prints goes through `to_stdout`, `to_stderr` or the console, which escape the names that others chose."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN_TEXT = {"dtl/text.py", "dtl/runs/console.py", "dtl/cli.py", "dtl/config/help.py", "dtl/commands/completion.py", "dtl/doctor/measure.py"}
"""Where the functions themselves are, or the text is dtl's own."""
OWN_WORDS = {"json.dumps", "help_text", "config.to_yaml"}
"""Their results are ASCII, or dtl's own."""


def test_no_module_prints_by_itself() -> None:
    found = []
    for file in sorted((ROOT / "dtl").rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                words = {ast.unparse(argument.func) for argument in node.args if isinstance(argument, ast.Call)}
                if name not in OWN_TEXT and not words & OWN_WORDS:
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not found, "\n".join(found)
