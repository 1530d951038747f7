"""The forward pass of everything that does not train, and one pass over the validation data.

Validation: integer counts summed over ranks, then one division, so it is exact at any world size. Its loss is the plain cross-entropy,
without smoothing and class weights, so that runs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.network import Network, Normalise, forward_logits, to_device
from dtl.training.losses import Loss
from dtl.training.metrics import Sums
from dtl.training.phases import Task


@dataclass(frozen=True)
class Outputs:
    """What the network gave for one batch. Its B rows are the images as the task made them."""

    batch: Batch
    logits: Tensor
    """float32 [B, K]"""
    labels: Tensor
    """int64 [B], on the device"""
    weights: Tensor
    """float32 [B], on the device: 0 for a pad or a damaged image"""


@dataclass(frozen=True)
class ForwardPass:
    """Images through a network without gradients: normalised on its device, in the runtime's precision.

    Validation, `dtl evaluate`, `dtl predict`, cached features and the report all compute here. The caller sets the module to eval mode.
    """

    module: Callable[[Tensor], Any]
    normalise: Normalise
    runtime: Runtime

    @classmethod
    def of(cls, network: Network, runtime: Runtime) -> ForwardPass:
        """The network on the runtime's device and in eval mode."""
        channels_last = to_device(network.module.eval(), runtime.device)
        return cls(network.module, Normalise(network.preprocessing, runtime.device, channels_last=channels_last), runtime)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] of a loader to what the module makes of them, float32: logits [B, K], or a backbone's features."""
        with torch.inference_mode():
            return self._logits(self.normalise(images))

    def over(self, batches: Iterable[Batch], task: Task) -> Iterator[Outputs]:
        """One batch after another, with the images and labels that the task makes of them. Nothing here waits for the device."""
        device = self.runtime.device
        for batch in batches:
            with torch.inference_mode():
                labels, weights = batch.labels.to(device, non_blocking=True), batch.weights.to(device, non_blocking=True)
                images, labels, weights = task.prepare(self.normalise(batch.images), labels, weights)
                logits = self._logits(images)
            yield Outputs(batch, logits, labels, weights)

    def _logits(self, images: Tensor) -> Tensor:
        with self.runtime.autocast():
            logits, _ = forward_logits(self.module, images)
        return logits.float()


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
) -> Sums | None:
    """Sums over all ranks, the same on each of them. `steps` is this rank's share, with the same number of steps on every rank.

    `agree(batches)` is called before a step, and what it returns after it: that may end the pass, on all ranks at once, and the result is
    None. So ranks can exchange flags while they compute.
    """
    sums, forward = Sums(num_outputs, device=runtime.device), ForwardPass(module, normalise, runtime)
    with eval_mode(module), closing(steps):  # type: ignore[type-var]
        for batches in steps:
            is_over = None if agree is None else agree(batches)
            for outputs in forward.over(batches, task):
                losses, _ = loss(outputs.logits, outputs.labels)
                sums.update(outputs.logits, outputs.labels, outputs.weights, losses)
            if is_over is not None and is_over():
                return None
    return reduce_sums(sums, runtime)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and each of its parts in its own mode again afterwards."""
    training = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, child in module.named_modules():
            child.training = training[name]


def reduce_sums(sums: Sums, runtime: Runtime) -> Sums:
    """The sums of all ranks, on every rank."""
    integers, floats = sums.tensors()
    return sums.from_tensors(runtime.sum(integers.cpu()), runtime.sum(floats.cpu()))
