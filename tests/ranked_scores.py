"""What the ranks of a launch make of images that are spread over them unevenly (`harness.start(..., by_rank=before)`)."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

MONITORS = ("auroc", "average_precision", "balanced_accuracy", "macro_f1", "recall:c")
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
            mine = _mine(runtime.rank, runtime.world_size)
            scores = Scores(num_classes)
            scores.add(logits[mine], labels[mine], torch.ones(len(mine)), mine)
            ranking = scores.all_ranks(runtime)
            found.append({"auroc": ranking.value("auroc"), "average_precision": ranking.value("average_precision")})
            found[-1]["with_intervals"] = ranking.with_intervals(Bootstrap(NUM))
        if runtime.is_main:
            Path("scores.json").write_text(json.dumps(found))
    sys.exit(0)


def _mine(rank: int, world: int) -> torch.Tensor:
    """The images of a rank: the last one has most of them, the first one few or none."""
    return torch.arange(NUM)[(torch.arange(NUM) % 7).clamp(max=world - 1) == world - 1 - rank]


def keep() -> None:
    """kept.json: by metric, the values of eight evaluations, which of them the default rule keeps after each, and a hash of what it holds of the images.

    Losses have few binary digits, so that their sum does not depend on its order.
    """
    from dtl.data.loading.batch import Batch
    from dtl.distributed.runtime import Runtime
    from dtl.training.evaluate import Outputs, Sums, reduce_sums
    from dtl.training.keep import Evaluated, ImageResults, PairedError, choose
    from dtl.training.metrics import Monitored

    found, classes = {}, "abcde"
    labels, first = case(len(classes), 3)
    with Runtime(device="cpu") as runtime:
        mine = _mine(runtime.rank, runtime.world_size)
        for monitor in MONITORS:
            kept: Evaluated | None = None
            best: Evaluated | None = None
            seen, values, places = list[Evaluated](), [], []
            for place in range(8):
                random = torch.Generator().manual_seed(place)
                logits = first * 0.3 + (1 + 0.2 * place) * torch.nn.functional.one_hot(labels, 5) + 1.2 * torch.randn(NUM, 5, generator=random)
                losses = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * (1 + 0.3 * abs(place - 3)) * 64).round() / 64
                batch = Batch(torch.zeros(len(mine), 3, 1, 1, dtype=torch.uint8), labels[mine], torch.ones(len(mine)), mine, mine, epoch=0, step=0)
                outputs = Outputs(batch, logits[mine], logits[mine], labels[mine], batch.weights)
                results, monitored, sums = ImageResults(monitor, tuple(classes), NUM), Monitored(monitor, classes, runtime.device), Sums(5)
                results.add(outputs, losses[mine])
                monitored.add(outputs, losses[mine])
                sums.update(outputs.logits, outputs.labels, outputs.weights, losses[mine])
                seen.append(results.all_ranks(runtime, {**reduce_sums(sums, runtime).result(), monitor: monitored.value(runtime)}))
                kept, best = choose(seen[-1], kept, best, PairedError(monitor, 5))
                values.append((seen[-1].value, seen[-1].loss))
                places.append(next(at for at, one in enumerate(seen) if one is kept))
            held = b"".join(tensor.numpy().tobytes() for one in (kept, best) if one is not None for tensor in one.tensors().values())
            found[monitor] = {"values": values, "kept": places, "held": hashlib.sha256(held).hexdigest()}
        if runtime.is_main:
            Path("kept.json").write_text(json.dumps(found))
    sys.exit(0)
