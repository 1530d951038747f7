"""The names that notebooks and scripts use: data in and weights in. What runs and uses models is `dtl.api_runs`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtl.checkpoint.transfer.apply import load_pretrained
from dtl.checkpoint.transfer.report import TransferReport
from dtl.config.models import AugmentConfig
from dtl.data.loading.batch import Transform
from dtl.data.loading.loader import StepLoader
from dtl.data.open import open_split
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.errors import TransferRefused, UserError

__all__ = ["BatchIterable", "TransferRefused", "TransferReport", "UserError", "build_loader", "load_pretrained", "pack"]


@dataclass
class BatchIterable:
    """Batches of one epoch, the same as training's: iterate it as often as you like, `epoch` may be changed in between."""

    shards: Shards
    transform: Transform
    image_size: int
    batch_size: int
    workers: int
    seed: int
    epoch: int
    shuffle: bool
    rank: int = 0
    world_size: int = 1
    decode_on: torch.device | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.shards.classes

    def __len__(self) -> int:
        return self._plan(self.epoch).num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images uint8 [B, 3, H, W], labels int64 [B], weights float32 [B]); weight 0 is padding. A damaged sample raises."""
        plan = self._plan(self.epoch)
        layout = RankLayout.for_plan(plan, num_ranks=self.world_size, micro_batch_size=None)
        loader = StepLoader(
            self.shards,
            self.transform,
            plans=self._plan,
            layout=layout,
            rank=self.rank,
            image_size=self.image_size,
            seed=self.seed,
            workers=self.workers,
            decode_on=self.decode_on,
        )
        for step in loader.steps(self.epoch, 0, plan.num_steps):
            for batch in step:
                if batch.bad:
                    raise batch.bad[0][1]
                yield batch.images, batch.labels, batch.weights

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self.shards.shard_sizes, seed=self.seed, epoch=epoch, global_batch_size=self.batch_size, shuffle=self.shuffle)


def build_loader(
    source: str | Path,
    split: str = "train",
    image_size: int = 224,
    batch_size: int = 64,
    workers: int = 2,
    seed: int = 0,
    epoch: int = 0,
    *,
    augment: AugmentConfig | None = None,
    cache_dir: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    decode_on: torch.device | None = None,
) -> BatchIterable:
    """The loader that training uses, without training: `for images, labels, weights in dtl.build_loader("photos/train"): ...`

    `split` "train" shuffles and augments (by default as the preset imagenet), "val" does neither. `batch_size` is that of all ranks together.
    Images stay uint8: normalise them on the device. `decode_on`: a GPU that decodes JPEGs, and holds the images then. Raises UserError for what cannot be read.
    """
    if split not in ("train", "val"):
        raise UserError(f"split is {split!r}; it must be train or val")
    shards = open_split(source, split=split, cache_dir=cache_dir)
    training = split == "train"
    transform = train_transform(image_size=image_size, augment=augment or AugmentConfig()) if training else eval_transform(image_size=image_size)
    return BatchIterable(shards, transform, image_size, batch_size, workers, seed, epoch, training, rank, world_size, decode_on)
