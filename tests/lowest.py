"""The lowest versions that pyproject.toml allows, together: `python3 tests/lowest.py FOLDER [PYTEST'S ARGUMENTS]`.

Makes a virtual environment in FOLDER with this Python and runs the unit tests in it. The other packages, those that only our dependencies need, are
the newest that these allow, as in a new environment that `pip` makes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest(project: dict[str, object], *extras: str) -> list[str]:
    """`torch==2.9.0` for `torch>=2.9.0`, of the dependencies and of these extras; a pinned one stays as it is, and so does the condition behind `;`."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    assert isinstance(project["dependencies"], list)
    wanted = [*project["dependencies"], *(requirement for extra in extras for requirement in optional[extra])]
    return list(dict.fromkeys(re.sub(r"^([\w.-]+)(\[[\w,]*\])?>=", r"\1==", requirement) for requirement in wanted))


def main(folder: Path, arguments: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    venv.create(folder, with_pip=True)
    python = folder.absolute() / "bin" / "python"
    bounds = folder / "lowest.txt"
    bounds.write_text("\n".join(lowest(project, "test")) + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]", "-c", bounds], check=True)
    # torchcodec 0.16 loads libraries of CUDA 13, which torch 2.9 does not bring: decoding on the device needs a newer torch.
    needs_torchcodec = ["--ignore", "tests/unit/data/loading/test_device.py", "--deselect", "tests/unit/test_benchmarks.py::test_the_gpus_runs_without_one"]
    arguments = arguments or ["tests/unit", *needs_torchcodec]
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
