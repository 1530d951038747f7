"""Trainings that tell what they have of PyTorch's compiler, by `command` of the harness."""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from typing import Any

from torch import nn

from dtl.cli import main
from dtl.config import load_config
from dtl.training import micro_batch, run


def usual(*arguments: str) -> int:
    assert main(list(arguments)) == 0
    print(json.dumps(sorted({"torch._dynamo", "torch.distributed.tensor", "sympy"} & set(sys.modules))))
    return 0


def compiled(recipe: str) -> int:
    from torch._dynamo.utils import counters

    # Dynamo as it is; without the code generator behind it, which takes a minute and decides nothing about when to compile.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="eager")  # type: ignore[assignment]
    fit, stats = micro_batch.fit, counters["stats"]

    def watched(*arguments: Any, **options: Any) -> Any:
        before = stats["unique_graphs"]
        halved = fit(*arguments, **options)
        assert stats["unique_graphs"] == before, "the trial of a micro-batch was compiled"
        print("tried", flush=True)
        return halved

    micro_batch.fit = watched
    assert run.run(*load_config(["--config", recipe])).state == "done"
    print(json.dumps({"graphs": stats["unique_graphs"], "breaks": len(counters["graph_break"])}))
    return 0
