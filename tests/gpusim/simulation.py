"""Simulated GPUs: builds them out of runtime/, and says which environment gives a process some. What they keep of a GPU's rules: runtime/world.h.

    python tests/gpusim/simulation.py COMMAND...        runs it with two; SIMCUDA_DEVICES=8 and the other settings of world.h go before it

It is tied to the inside of PyTorch, so to the versions in TORCH, and to a PyTorch with CUDA (whose libraries it stands in for); it is built by g++, once
for each version of PyTorch and of itself, into build/gpusim/.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from dtl.files import flock

TORCH = ("2.14", "2.15")
"""Tried with PyTorch from the first version to before the second."""
_HERE = Path(__file__).resolve().parent
_TESTS, _ROOT = _HERE.parent, _HERE.parents[1]
_SOURCES = _HERE / "runtime"
_ENTRY_POINT = "[torch.backends]\ngpusim = gpusim.plugin:load\n"


def missing() -> str:
    """What this machine lacks for simulated GPUs, in words; empty where it has everything."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    first, end = (tuple(int(part) for part in text.split(".")) for text in TORCH)
    if not first <= version < end:
        return (
            f"tests/gpusim was tried with PyTorch {TORCH[0]} to before {TORCH[1]}, here is {torch.__version__}: "
            "try it (TORCH in tests/gpusim/simulation.py), and mend what no longer holds"
        )
    if torch.version.cuda is None:
        return f"tests/gpusim needs a PyTorch with CUDA, here is {torch.__version__}: pip install torch, from PyPI"
    lacking = [name for name in ("cuda_runtime_api.h", "nccl.h") if _folder_of(name) is None]
    if lacking:
        return f"tests/gpusim needs {' and '.join(lacking)}, which PyTorch's own packages from PyPI bring along (nvidia-cuda-runtime, nvidia-nccl)"
    if shutil.which("g++") is None:
        return "tests/gpusim needs g++ to build the simulated GPUs: apt-get install g++"
    return ""


def require() -> None:
    """Skip this test where simulated GPUs cannot be built. In CI, which has what they need, it fails instead."""
    import pytest

    if problem := missing():
        (pytest.fail if os.environ.get("DTL_CI") else pytest.skip)(problem)


def environment(**settings: object) -> dict[str, str]:
    """The variables that give a new process simulated GPUs: `environment(devices=2, mem_mb=4096)`; builds them if they are not built yet."""
    built = build()
    return {
        "LD_PRELOAD": _before("LD_PRELOAD", built / "libsimcuda.so"),
        "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", built),
        "PYTHONPATH": _before("PYTHONPATH", built / "site", _TESTS, _ROOT),
        "GPUSIM_BUILD": str(built),
        "ACCELERATE_USE_CPU": "false",  # tests/conftest.py says true
        **{f"SIMCUDA_{name.upper()}": str(value) for name, value in settings.items()},
    }


def _before(name: str, *paths: Path) -> str:
    return os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get(name)])])


def build() -> Path:
    """The folder of the built simulation. RuntimeError with what is missing, or with what the compiler said."""
    problem = missing()
    if problem:
        raise RuntimeError(problem)
    built = _ROOT / "build/gpusim" / _key()
    if (built / "complete").exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / "lock").open("w") as lock:
        flock(lock)
        if not (built / "complete").exists():
            shutil.rmtree(built, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                _compile(Path(folder))
                shutil.move(folder, built)
                Path(folder).mkdir()  # for the context manager, which takes it away
            (built / "complete").touch()
    return built


def _key() -> str:
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(path for path in (*_SOURCES.rglob("*"), Path(__file__)) if path.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _folder_of(header: str) -> Path | None:
    import torch

    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    return next((path.parent for path in sorted(nvidia.glob(f"*/include/{header}"))), None)


def _compile(into: Path) -> None:
    import torch

    home = Path(torch.__file__).parent
    headers = [f"-I{folder}" for folder in (_SOURCES / "headers", _folder_of("cuda_runtime_api.h"), _folder_of("nccl.h"))]
    of_torch = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}", "-w"]
    operators, runtime = _SOURCES / "operators.cpp", sorted(set(_SOURCES.glob("*.cpp")) - {_SOURCES / "operators.cpp"})
    _run_all(  # side by side: the first takes longest
        ["g++", "-std=c++20", "-O1", "-fPIC", *headers, *of_torch, "-c", operators, "-o", into / "operators.o"],
        ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-fPIC", "-shared", *headers, *runtime, "-o", into / "libsimcuda.so", "-ldl", "-lpthread"],
    )
    ours, torchs = [f"-L{into}", "-Wl,--no-as-needed", "-lsimcuda"], [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-lc10_cuda"]
    _run_all(
        ["g++", "-shared", into / "operators.o", "-o", into / "libsimops.so", *ours, *torchs],
        ["gcc", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", _SOURCES / "driver.c", *ours, "-o", into / "libcuda.so.1"],
    )
    (into / "operators.o").unlink()
    # PyTorch loads the entry points of this group at the end of `import torch`: no `sitecustomize`, of which a process has only one.
    package = into / "site/gpusim-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gpusim\nVersion: 0\n")
    (package / "entry_points.txt").write_text(_ENTRY_POINT)


def _run_all(*commands: list[str | Path]) -> None:
    running = [subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"tests/gpusim could not be built:\n{error[-4000:]}")


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment()})
