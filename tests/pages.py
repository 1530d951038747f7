"""README and docs as the commands and blocks that stand in them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def lines_of(block: str) -> list[str]:
    """The commands of a bash block: backslashes join lines, `&&` parts them, remarks are left out."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(" +", " ", line.split(" #")[0].strip())
        found += [part.strip() for part in line.split("&&") if part.strip() and not part.strip().startswith("#")]
    return found


@lru_cache
def help_of(command: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dtl", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout
