"""The release check (`pytest -m soak tests/release`): the wheel, installed in a fresh environment, runs the example from anywhere.

A light part of it is in every run of the tests: what is in the wheel, and that its commands work from there alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**variables, **env}, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_what_is_in_the_wheel_is_enough(tmp_path: Path) -> None:
    """Unpacked away from the repository: the recipes, the digits and the commands are there; nothing is missing, nothing too much."""
    source = tracked_files(tmp_path)
    call(sys.executable, "-c", _BUILD, tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("dtl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    modules = {str(path.relative_to(source)) for path in (source / "dtl").rglob("*.py")}
    data = {
        "dtl/py.typed",
        "dtl/data/sources/digits.npz",
        "dtl/data/decoding/_jpeg_crop.pyi",
        "dtl/report/page.html.j2",
        *(f"dtl/recipes/{name}.yaml" for name in ("digits", "features", "finetune")),
    }
    assert {name for name in names if not name.endswith((".so", ".c")) and ".dist-info/" not in name} == modules | data
    away = tmp_path / "away"
    away.mkdir()
    code = "import dtl; from dtl.data.sources.digits import read_digits; print(dtl.__file__, len(read_digits()[0]))"
    assert call(sys.executable, "-c", code, cwd=away, PYTHONPATH=str(tmp_path / "site")).split() == [f"{tmp_path}/site/dtl/__init__.py", "1797"]
    words = ["--config", "finetune", "--data.train", "a", "--data.val", "b", "--print-config"]
    assert "layer_decay: 0.7" in call(sys.executable, "-m", "dtl", "train", *words, cwd=away, PYTHONPATH=str(tmp_path / "site"))


def tracked_files(folder: Path) -> Path:
    """A copy of the repository's tracked files: building writes into the source tree."""
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    return source


# The build backend itself, as pip would call it: no environment of its own, so no network.
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.mark.soak
def test_the_wheel_runs_the_example_outside_the_repository(tmp_path: Path) -> None:
    # A copy: building writes into the source tree.
    source = tmp_path / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dtl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dtl/py.typed", "dtl/recipes/digits.yaml", "dtl/data/sources/digits.npz", "dtl/train.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]

    # A fresh environment with this one's packages, but not with this checkout.
    fresh = tmp_path / "fresh"
    call(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / "bin/python"
    (site,) = fresh.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages-of-this-environment.pth").write_text("\n".join(packages) + "\n")
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)

    away = tmp_path / "away"
    away.mkdir()
    where = call(python, "-c", "import dtl; print(dtl.__file__)", cwd=away).strip()
    assert where.startswith(str(fresh)), f"{where}: this is the checkout"
    quick = ["--phases.pretext.epochs", "0.1", "--phases.head.epochs", "0.1", "--phases.all.epochs", "0.2"]
    call(python, "-m", "dtl", "train", *quick, cwd=away, WANDB_MODE="disabled", DTL_CACHE=str(tmp_path / "cache"))
    status = json.loads((away / "runs/digits/status.json").read_text())
    assert status["state"] == "done"
    assert (away / "runs/digits/report/index.html").is_file()
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "dtl", "evaluate", "runs/digits"]
    assert "top1" in call(*launch, cwd=away, DTL_CACHE=str(tmp_path / "cache"))


@pytest.mark.soak
@pytest.mark.parametrize("compiler", ["cc", "/there/is/no/compiler"])
def test_it_builds_with_a_compiler_and_without_one(compiler: str, tmp_path: Path) -> None:
    """With one the native extra is inside (if libjpeg-turbo's headers are there), without one the rest is."""
    source = tmp_path / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source, cwd=tmp_path, CC=compiler)
    (wheel,) = tmp_path.glob("dtl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dtl/data/decoding/decode.py" in names
    built = [name for name in names if name.startswith("dtl/data/_jpeg_crop.") and name.endswith(".so")]
    assert len(built) == (compiler == "cc" and Path("/usr/include/jpeglib.h").exists())
