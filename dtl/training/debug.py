"""`--run.debug`: a run that is easy to look into, and a first check that the network can learn at all."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

import torch

from dtl.config import Config
from dtl.distributed.runtime import use_fast_kernels
from dtl.errors import UserError
from dtl.models.build import forward_logits
from dtl.models.freeze import freeze
from dtl.models.normalise import Normalise
from dtl.training.loop import Trainer

OVERFIT_STEPS = 200
OVERFIT_IMAGES = 16


def debug_config(config: Config, name: str) -> tuple[Config, str]:
    """The same recipe with few samples, no workers, no tracker, one epoch a phase, in a run folder of its own that starts afresh."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("run.debug is for one process; launch it with python dtl/train.py")
    values = config.to_dict()
    values["run"] |= {"name": f"{name}-debug", "resume": "never"}
    values["data"]["workers"] = 0
    values["tracking"] |= {"wandb": "off", "tensorboard": False, "log_every": 1}
    for phase in values["phases"].values():
        phase |= {"epochs": 1.0, "steps": None}
    return Config.model_validate(values), f"{name}-debug"


@contextlib.contextmanager
def debug_mode(wanted: bool) -> Iterator[None]:
    """Anomaly detection and deterministic algorithms while it lasts; mistakes keep their traceback."""
    if not wanted:
        yield
        return
    os.environ["DTL_DEBUG"] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no deterministic kernels
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn = torch.backends.cudnn
    precision, benchmark, tf32 = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
    use_fast_kernels(False)
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32


def overfit_one_batch(trainer: Trainer) -> None:
    """Fit a copy of the network to one batch: a network, a loss or labels that cannot do even that will not learn anything."""
    phase = trainer.phases[-1]
    stream = trainer.loaders.train_steps(phase, 0)
    with contextlib.closing(stream):  # type: ignore[type-var]
        batch = next(stream)[0]
    device = trainer.runtime.device
    module = copy.deepcopy(trainer.network.module)
    freeze(module, {name for name, _ in module.named_parameters()})
    module.train()
    normalise = Normalise(trainer.network.preprocessing, device, channels_last=trainer.channels_last)
    few = slice(OVERFIT_IMAGES)
    images, labels, _ = phase.task.prepare(normalise(batch.images[few]), batch.labels[few].to(device), batch.weights[few].to(device))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < OVERFIT_STEPS and not (losses and losses[-1] < 0.5 * losses[0]):
        logits, _auxiliary = forward_logits(module, images)
        if logits.shape[1] != phase.num_outputs:
            trainer.tracker.print("overfit one batch: skipped, the last phase gets its head later")
            return
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    verdict = "it can learn" if losses[-1] < 0.5 * losses[0] else "IT DOES NOT LEARN: look at the images, the labels and the network"
    trainer.tracker.print(f"overfit one batch: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps: {verdict}")
