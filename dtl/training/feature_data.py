"""Batches of cached features, as the loop takes batches of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtl.data.loading.batch import Batch
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import Shards
from dtl.errors import DamagedSample

FACTS_NAME = "facts.json"


class FeatureDataset:
    """For `StepLoader`: batches whose `images` are features, float32 [B, ...]. The view of an epoch is (epoch - first) modulo V."""

    def __init__(self, shards: Shards, folder: Path, split: str, first_epoch: int) -> None:
        self.shards, self.first_epoch = shards, first_epoch
        self.values: Any = np.load(folder / f"{split}.npy", mmap_mode="r")
        damage = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))["damaged"][split]
        self.damaged = {(view, sample): DamagedSample(**facts) for view, sample, facts in damage}

    def __getitems__(self, request: MicroBatch) -> Batch:
        view = (request.epoch - self.first_epoch) % len(self.values)
        labels = np.asarray(self.shards.labels[request.samples], np.int64)
        labels = np.where((labels < 0) | (labels >= self.shards.num_classes), 0, labels)  # of a damaged sample, at weight 0
        weights = request.weights.copy()
        bad = []
        if self.damaged:
            for slot, sample in enumerate(request.samples.tolist()):
                if (view, sample) in self.damaged:
                    weights[slot] = 0.0
                    if request.slots[slot] >= 0:
                        bad.append((sample, self.damaged[view, sample]))
        return Batch(
            images=torch.from_numpy(self.values[view][request.samples]),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            samples=torch.from_numpy(request.samples),
            slots=torch.from_numpy(request.slots),
            epoch=request.epoch,
            step=request.step,
            bad=bad,
        )
