"""For all tests: few threads, no services, no home folder."""

from __future__ import annotations

import atexit
import getpass
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples at each run: a test that fails fails for everybody. Machines are busy at times, which is no fault of the code.
settings.register_profile("dtl", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("soak", settings.get_profile("dtl"), max_examples=5000, derandomize=False)
settings.load_profile("dtl")

# Temporary files of tests, of the processes that they start and kill, and of their libraries go together. xdist's workers have theirs inside of the
# first process's, which removes it: workers end without their atexit. What pytest keeps (tmp_path) and torch's compiled code stay where they were.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="dtl-tests-")
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: tests that start processes would fight over them
# Bit for bit is promised on CPUs, and two processes need no two GPUs there. `--device` asks for GPUs, and tests/gpu for simulated ones.
os.environ["ACCELERATE_USE_CPU"] = "true"
# What this user has made and trusts (dtl/config/own.py): nothing yet.
os.environ["XDG_CONFIG_HOME"] = os.path.join(os.environ["TMPDIR"], "config")
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
# Each machine tests what runs on a CPU with bf16 and on one without: .ci/run.
if os.environ.get("DTL_TEST_BF16") or os.environ.get("DTL_TEST_BF16_ASKED"):
    folder = str(Path(__file__).with_name("forced_bf16"))
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_path(f"{folder}/sitecustomize.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "sim", "cuda"),
        help="what the runs of tests/distributed, tests/resilience and tests/gpu compute on: CPUs, simulated GPUs (tests/gpusim) or this machine's GPUs; "
        "if not given, simulated GPUs in tests/gpu and CPUs everywhere else",
    )
    parser.addoption("--kills", type=int, default=8, help="how often runs are killed in tests/resilience/test_kills.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "soak":
        settings.load_profile("soak")
    device = config.getoption("device")
    if device in (None, "cpu"):
        return
    import harness
    import torch
    from gpusim import simulation

    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine shows no GPU to PyTorch; --device sim runs the same on simulated ones")
    harness.default_device = device
    os.environ["ACCELERATE_USE_CPU"] = "false"
    if device == "sim":
        if problem := simulation.missing():
            raise pytest.UsageError(problem)
        os.environ.update(simulation.environment(devices=8))  # for launchers and commands that tests start


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`pytest -m soak tests/fuzz`: the same tests, with fifty times as many examples, and others each time."""
    for item in items:
        if config.option.markexpr == "soak" and "fuzz" in item.path.parts:
            item.add_marker("soak")


@pytest.fixture(scope="session")
def real_images() -> Path:
    """hymenoptera_data/ and flowers/: other people's photos, which are not in the repository."""
    return _of_the_environment("DTL_DATA", "the folder that holds hymenoptera_data and flowers")


@pytest.fixture(scope="session")
def imagenet_weights() -> Path:
    """MobileNetV2's, 14 MB: a package that is not ours carries them; docs/weight-transfer.md has the two lines that fetch them, and .ci/run does it."""
    return _of_the_environment("DTL_MBV2", "the MobileNetV2 weights that docs/weight-transfer.md tells how to fetch")


def _of_the_environment(name: str, what: str) -> Path:
    if not os.environ.get(name):
        pytest.skip(f"set {name} to {what}; the repository does not hold them")
    return Path(os.environ[name])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    """A test that fails between the start of a run and its end leaves no trainer behind, which would take the next tests' time."""
    yield
    harness = sys.modules.get("harness")  # only tests that start runs import it
    while harness is not None and harness.started:
        harness.started.pop().end()
