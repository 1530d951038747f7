"""`after: blend`: weights between those that entered a phase and those at its end (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

The weights at `share` of the way are start + share (end - start), tensor by tensor. Those of the two ends are the phase's own evaluations before its first step
and after its last one; the points between are evaluated here, and the phase's rule of kept weights chooses among all of them (`dtl.training.keep`).

Running statistics of batch norms. Where both ends have the same ones, bit for bit (`norm_statistics: frozen`, frozen parts), they are constants of the
network: it was trained with them, and every point has them. Where they differ, their mean describes the activations of no network (Izmailov et al. 2018,
"Averaging weights leads to wider optima"; Jordan et al. 2022, "REPAIR"), so each point gets its own: of at most `MOST_IMAGES` training images as evaluation
sees them. They come in a fixed order and in batches that do not depend on the number of ranks, so the statistics are the same at any number of them.

Letters: C channels of all those norms together, n batches, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.network import Normalise, eval_mode
from dtl.models.norms import statistics_of_batch
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.evaluate import ForwardPass

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the way from start to end, as WiSE-FT's authors look at them. Each costs one evaluation."""
MOST_IMAGES = 1024
"""Of the training set, for the statistics of a point: Wu and Johnson 2021 ("Rethinking Batch in BatchNorm") found 10^3 to be enough on ImageNet."""
BATCH = 32


def points(
    active: ActivePhase, loaders: DataLoaders, runtime: Runtime, *, normalise: Normalise, stops: Callable[[list[Batch]], bool]
) -> Iterator[float | None]:
    """Put the weights of one point after another into the network, on all ranks, and yield its share of the way; None: stop. `stops`: as below.

    Afterwards the network has the weights of the last point: what the phase keeps has to be put there.
    """
    active.sync_buffers(runtime)
    end = active.at_end(runtime)
    norms = runtime.agree(moved_norms(active.module, active.start, end))
    for share in SHARES:
        active.put(between(active.start, end, share), runtime)
        if norms:
            num, clean = loaders.clean_batches(BATCH, MOST_IMAGES)
            with closing(clean):  # type: ignore[type-var]
                goes_on = estimate_statistics(ForwardPass(active.module, normalise, runtime), active.module, norms, num, clean, stops=stops)
            if not goes_on:
                yield None
        yield share


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights at `share` of the way: the tensors of an end themselves at 0 and 1. What `start` lacks, and what is no floating point number, is the end's.

    A tensor that is the same at both ends is the same at every point, bit for bit.
    """
    made = dict(end)
    for name, first in start.items():
        last = end[name]
        if share in (0.0, 1.0):
            made[name] = first if share == 0.0 else last
        elif last.is_floating_point():
            exact = torch.promote_types(last.dtype, torch.float32)
            made[name] = torch.lerp(first.to(exact), last.to(exact), share).to(last.dtype)
    return made


def moved_norms(module: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> list[str]:
    """The names of the batch norms whose running statistics are not the same at both ends."""
    norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
    return [name for name in norms if any(key in start and not torch.equal(start[key], end[key]) for key in (f"{name}.running_mean", f"{name}.running_var"))]


def estimate_statistics(
    forward: ForwardPass,
    module: nn.Module,
    names: Sequence[str],
    num_batches: int,
    stream: Iterator[list[Batch]],
    *,
    stops: Callable[[list[Batch]], bool],
) -> bool:
    """Give the batch norms `names` the running statistics that `module` has on `num_batches` batches, of which `stream` gives this rank's stretch. False: stop
    (on all ranks).

    `stops(batches)` is called by all ranks before each batch: it takes damaged images, and says whether to stop. Means and variances are those over all images,
    where each batch has been normalised by its own before it reaches a norm, as in training.
    """
    runtime, norms = forward.runtime, [part for name in names if isinstance(part := module.get_submodule(name), _BatchNorm)]
    width = sum(len(norm.running_mean) for norm in norms if norm.running_mean is not None)
    most = -(-num_batches // runtime.world_size)
    rows = torch.zeros(most, 1 + 2 * width, dtype=torch.float64)
    """Of this rank's batches: the number of images, the means [C] and the variances [C]."""
    with eval_mode(module):
        for row in rows:
            batches = next(stream, [])
            if stops(batches):
                return False
            for batch in batches:
                images = batch.images[batch.weights > 0]
                if len(images) > 1:  # a batch of one has no variance where a channel has one value
                    row[0] = len(images)
                    row[1:] = statistics_of_batch(norms, partial(forward, images)).flatten().cpu()
    everyone = torch.cat(runtime.gather_rows(rows))  # rank by rank: in the order of the batches, whatever R is, but for rows of zeros
    counts, means, variances = everyone[:, :1], everyone[:, 1 : 1 + width], everyone[:, 1 + width :]
    total = counts.sum()
    if not total:
        return True
    mean, square = ordered_sum(counts * means) / total, ordered_sum(counts * (variances + means**2)) / total
    place = 0
    with torch.no_grad():
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            own = slice(place, place := place + len(norm.running_mean))
            norm.running_mean.copy_(mean[own])
            norm.running_var.copy_((square - mean**2)[own])
    return True


def ordered_sum(rows: Tensor) -> Tensor:
    """Over the first dimension, one row after another: rows of zeros in between, of which there are as many as ranks, change no bit."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total
