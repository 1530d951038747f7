"""`model.compile`: batches have one size by design, so that each phase is compiled once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import write_recipe

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
from functools import partialmethod
from torch import nn
# Dynamo as it is; without the code generator behind it, which takes a minute and decides nothing about when to compile.
nn.Module.compile = partialmethod(nn.Module.compile, backend="eager")
from dtl.training.run import run
from dtl.config import load_config
from dtl.training import micro_batch
from torch._dynamo.utils import counters
fit = micro_batch.fit
def watched(*arguments, **options):
    before = counters["stats"]["unique_graphs"]
    halved = fit(*arguments, **options)
    assert counters["stats"]["unique_graphs"] == before, "the trial of a micro-batch was compiled"
    print("tried", flush=True)
    return halved
micro_batch.fit = watched
assert run(*load_config(["--config", sys.argv[1]])).state == "done"
print(json.dumps({"graphs": counters["stats"]["unique_graphs"], "breaks": len(counters["graph_break"])}))
"""


@pytest.mark.parametrize("size", [50, "auto"])
def test_each_phase_is_compiled_once(tmp_path: Path, size: int | str) -> None:
    """119 does not divide 1,437 images, and 50 does not divide 119: the last batch of an epoch and of a step are padded."""
    phases = {"head": {"train": "head", "steps": 2, "lr": 0.1, "cache_features": False}, "all": {"train": "all", "epochs": 2, "lr": 0.05}}
    data = {"global_batch_size": 119, "micro_batch_size": size, "workers": 0}
    recipe = write_recipe(tmp_path, model={"name": "networks:small", "compile": True}, data=data, phases=phases)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(recipe)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tried\n") == (2 if size == "auto" else 0)
    assert json.loads(done.stdout.splitlines()[-1]) == {"graphs": 2, "breaks": 0}
