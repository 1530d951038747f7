"""All benchmarks with one command: `python -m benchmarks` lists them, `python -m benchmarks NAME [options]` runs one, `... all` each in turn.

Run it from the repository's root. Each is a program of its own: `python -m benchmarks.NAME --help`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name -> first line of its description; a benchmark is a module or a package here that can be run."""
    found = {}
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("*/__main__.py")]):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text and path != HERE / "__main__.py":
            found[path.stem if path.parent == HERE else path.parent.name] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    known = benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip() + "\n")
        for name, line in known.items():
            print(f"{name:18} {line}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name != "all" and name not in known:
        print(f"there is no benchmark {name!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    worst = 0
    for each in known if name == "all" else [name]:
        print(f"== {each}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{each}", *rest], cwd=HERE.parent).returncode)
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
