"""Simulated GPUs keep a GPU's rules, and take the worst case where the rules leave room."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from gpusim import rules, simulation
from harness import start

SETTINGS = {"memory_ends": {"SIMCUDA_MEM_MB": "64"}, "one_is_visible": {"CUDA_VISIBLE_DEVICES": "1"}, "it_may_be_an_old_one": {"SIMCUDA_CC": "75"}}
OF_TWO_RANKS = ("collectives_combine", "a_rank_that_ended_is_waited_for")
RULES = [name for name, value in vars(rules).items() if getattr(value, "__module__", "") == rules.__name__ and not name.startswith("_")]
HELPERS = ("on_host", "raised")


@pytest.fixture(scope="module", autouse=True)
def _simulated() -> None:
    simulation.require()
    simulation.build()


@pytest.mark.parametrize("rule", [name for name in RULES if name not in HELPERS])
def test_a_rule(tmp_path: Path, rule: str) -> None:
    world = 2 if rule in OF_TWO_RANKS else 1
    job = start([], cwd=tmp_path, command=f"gpusim.rules:{rule}", device="sim", world=world, env=SETTINGS.get(rule)).wait(60)
    job.check(-signal.SIGSEGV if rule == "the_host_cannot_read_device_memory" else 0)


def test_it_is_built_once() -> None:
    built = simulation.build()
    times = {file: file.stat().st_mtime_ns for file in built.iterdir()}
    assert simulation.build() == built
    assert {file: file.stat().st_mtime_ns for file in built.iterdir()} == times
    assert {"libsimcuda.so", "libsimops.so", "libcuda.so.1", "complete"} <= {file.name for file in times}


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("version", "was tried with PyTorch 2.14 to before 2.15, here is 2.13.0"),
        ("cuda", "needs a PyTorch with CUDA, here is "),
        ("g++", r"needs g\+\+ to build the simulated GPUs: apt-get install g\+\+"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, lacks: str, message: str) -> None:
    """In a skip; in CI the tests fail by it."""
    import torch

    if lacks == "version":
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    elif lacks == "cuda":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("DTL_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=message):
        simulation.require()
    monkeypatch.setenv("DTL_CI", "1")
    with pytest.raises(pytest.fail.Exception, match=message):
        simulation.require()
    with pytest.raises(RuntimeError, match=message):
        simulation.build()
