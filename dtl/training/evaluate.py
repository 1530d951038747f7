"""One pass over the validation data: integer counts summed over ranks, then one division. Exact at any world size.

The loss reported is the plain cross-entropy, without smoothing and class weights, so that runs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import nn

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.normalise import Normalise
from dtl.training.losses import Loss
from dtl.training.metrics import Sums
from dtl.training.tasks import Task


def evaluate(
    module: nn.Module,
    steps: Iterator[list[Batch]],
    runtime: Runtime,
    *,
    task: Task,
    num_outputs: int,
    loss: Loss,
    normalise: Normalise,
    agree: Callable[[list[Batch]], Callable[[], bool]] | None = None,
    confusion: bool = False,
) -> Sums | None:
    """Sums over all ranks, the same on each of them. `steps` is this rank's share, with the same number of steps on every rank.

    `agree(batches)` is called before a step, and what it returns after it: that may end the pass, on all ranks at once, and the result is
    None. So ranks can talk while they compute.
    """
    sums = Sums(num_outputs, device=runtime.device, confusion=confusion)
    training = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        with torch.inference_mode(), closing(steps):  # type: ignore[type-var]
            for batches in steps:
                ends = None if agree is None else agree(batches)
                for batch in batches:
                    _add(sums, module, batch, runtime, task=task, loss=loss, normalise=normalise)
                if ends is not None and ends():
                    return None
    finally:
        for name, child in module.named_modules():
            child.training = training[name]
    return reduce_sums(sums, runtime)


def _add(sums: Sums, module: nn.Module, batch: Batch, runtime: Runtime, *, task: Task, loss: Loss, normalise: Normalise) -> None:
    images = normalise(batch.images)
    labels, weights = batch.labels.to(runtime.device, non_blocking=True), batch.weights.to(runtime.device, non_blocking=True)
    images, labels, weights = task.prepare(images, labels, weights)
    with runtime.accelerator.autocast():
        logits = module(images)
    if not isinstance(logits, torch.Tensor):
        logits = logits["logits"] if isinstance(logits, dict) else logits[0]
    logits = logits.float()
    losses, _ = loss(logits, labels)
    sums.update(logits, labels, weights, losses)


def reduce_sums(sums: Sums, runtime: Runtime) -> Sums:
    """The sums of all ranks, on every rank."""
    integers, floats = sums.tensors()
    return sums.from_tensors(runtime.sum(integers.cpu()), runtime.sum(floats.cpu()))
