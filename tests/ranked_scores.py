"""What the ranks of a launch make of images that are spread over them unevenly (`harness.start(..., by_rank=before)`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

CASES = [(2, 1), (2, 1000), (5, 3)]
"""Classes, and levels of the logits (few: ties)."""
NUM = 101


def case(num_classes: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and logits."""
    random = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(0, num_classes, (NUM,), generator=random)
    logits = torch.randn(NUM, num_classes, generator=random) + torch.nn.functional.one_hot(labels, num_classes)
    return labels, (logits * levels).round() / levels


def write() -> None:
    """scores.json: by case the two metrics with their intervals. The last rank has most images, the first one none."""
    from dtl.distributed.runtime import Runtime
    from dtl.intervals import Bootstrap
    from dtl.training.metrics import Scores

    found = []
    with Runtime(device="cpu") as runtime:
        for num_classes, levels in CASES:
            labels, logits = case(num_classes, levels)
            mine = torch.arange(NUM)[(torch.arange(NUM) % 7).clamp(max=runtime.world_size - 1) == runtime.world_size - 1 - runtime.rank]
            scores = Scores(num_classes)
            scores.add(logits[mine], labels[mine], torch.ones(len(mine)), mine)
            ranking = scores.all_ranks(runtime)
            found.append({"auroc": ranking.value("auroc"), "average_precision": ranking.value("average_precision")})
            found[-1]["with_intervals"] = ranking.with_intervals(Bootstrap(NUM))
        if runtime.is_main:
            Path("scores.json").write_text(json.dumps(found))
    sys.exit(0)
