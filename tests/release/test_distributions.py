"""The sdist and the wheel: what is in them is enough, and the wheel, installed in a fresh environment, runs the example from anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The build backend itself, as `python -m build --no-isolation` calls it: no environment of its own, so no network.
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**variables, **env}, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [name for name in found if name and (ROOT / name).is_file()]


class Built(NamedTuple):
    """`unpacked`: the sdist's folder, from which the wheel was built."""

    sdist: Path
    unpacked: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of the tracked files, and the wheel built from nothing but the sdist, as pip and `python -m build` do."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in tracked():  # a copy: building writes into the source tree
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    call(sys.executable, "-c", _BUILD, "sdist", folder, cwd=source)
    (sdist,) = folder.glob("dtl_train-*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    call(sys.executable, "-c", _BUILD, "wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("dtl_train-*.whl")
    return Built(sdist, unpacked, wheel)


def test_the_sdist_holds_the_package_and_what_people_open(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("dtl_train.egg-info/")}
    folders = ("dtl/", "configs/", "docs/", "launch/", "slurm/")
    files = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "NOTICE", "README.md", "pyproject.toml", "setup.py"}
    assert names - generated == {name for name in tracked() if name.startswith(folders)} | files


def test_what_is_in_the_wheel_is_enough(built: Built, tmp_path: Path) -> None:
    """Unpacked away from the repository: the recipes, the digits and the commands are there; nothing is missing, nothing too much."""
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    modules = {name for name in tracked() if name.startswith("dtl/") and name.endswith(".py")}
    data = {
        "dtl/py.typed",
        "dtl/data/sources/digits.npz",
        "dtl/data/decoding/_jpeg_crop.pyi",
        "dtl/checkpoint/transfer/match/dialects.yaml",
        "dtl/config/families.yaml",
        "dtl/checkpoint/transfer/shapes.npz",
        "dtl/report/page.html.j2",
        *(f"dtl/recipes/{name}.yaml" for name in ("digits", "features", "finetune")),
    }
    assert {name for name in names if not name.endswith((".so", ".c")) and ".dist-info/" not in name} == modules | data
    assert "\nName: dtl-train\n" in metadata  # `dtl` on PyPI is another project
    assert "\nLicense-File: LICENSE\nLicense-File: NOTICE\n" in metadata
    away = tmp_path / "away"
    away.mkdir()
    code = "import dtl; from dtl.data.sources.digits import read_digits; print(dtl.__file__, len(read_digits()[0]))"
    assert call(sys.executable, "-c", code, cwd=away, PYTHONPATH=str(tmp_path / "site")).split() == [f"{tmp_path}/site/dtl/__init__.py", "1797"]
    words = ["--config", "finetune", "--data.train", "a", "--data.val", "b", "--print-config"]
    assert "layer_decay: 0.7" in call(sys.executable, "-m", "dtl", "train", *words, cwd=away, PYTHONPATH=str(tmp_path / "site"))


def test_the_wheel_installed_in_a_fresh_environment_runs_the_example_outside_the_repository(built: Built, tmp_path: Path) -> None:
    # This environment's packages, but not its checkout: a .pth file in a folder that a .pth file names is not read, and so no editable installation.
    fresh = tmp_path / "fresh"
    call(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / "bin/python"
    (site,) = fresh.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages-of-this-environment.pth").write_text("\n".join(packages) + "\n")
    call(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", built.wheel, cwd=tmp_path)
    call(python, "-m", "pip", "install", "-q", "--no-index", "dtl-train", cwd=tmp_path)  # every package that it requires is there, in a version it accepts

    away = tmp_path / "away"
    away.mkdir()
    where = call(python, "-c", "import dtl; print(dtl.__file__)", cwd=away).strip()
    assert where.startswith(str(fresh)), f"{where}: this is the checkout"
    assert call(fresh / "bin/dtl", "--version", cwd=away) == f"dtl {version()}\n"
    quick = ["--phases.pretext.steps", "2", "--phases.head.steps", "2", "--phases.all.steps", "4"]
    call(fresh / "bin/dtl", "train", *quick, cwd=away, WANDB_MODE="disabled", DTL_CACHE=str(tmp_path / "cache"))
    status = json.loads((away / "runs/digits/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 8)
    assert (away / "runs/digits/report/index.html").is_file()
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "dtl", "evaluate", "runs/digits"]
    assert "top1" in call(*launch, cwd=away, DTL_CACHE=str(tmp_path / "cache"))


def version() -> str:
    (found,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(found)


def test_nothing_tells_people_to_install_the_other_project() -> None:
    """`pip install dtl` gives somebody else's package."""
    for name in tracked():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".sbatch", ".sh")) and name != "tests/release/test_distributions.py":
            found = re.search(r"pip install (?:-\S+ )*'?dtl\b(?!-train)", (ROOT / name).read_text())
            assert found is None, f"{name}: {found and found[0]}"


@pytest.mark.soak
@pytest.mark.parametrize("compiler", ["cc", "/there/is/no/compiler"])
def test_it_builds_with_a_compiler_and_without_one(compiler: str, built: Built, tmp_path: Path) -> None:
    """With one the native extra is inside (if libjpeg-turbo's headers are there), without one the rest is."""
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, built.sdist, cwd=tmp_path, CC=compiler)
    (wheel,) = tmp_path.glob("dtl_train-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dtl/data/decoding/decode.py" in names
    native = [name for name in names if name.startswith("dtl/data/decoding/_jpeg_crop.") and name.endswith(".so")]
    assert len(native) == (compiler == "cc" and Path("/usr/include/jpeglib.h").exists())
