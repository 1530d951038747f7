"""The splits of one run: what it trains on, what chooses its weights, and what is measured once at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from dtl.config.models import DataConfig
from dtl.data.open import open_split
from dtl.data.shards.index import Shards
from dtl.data.shards.manifest import check_class_maps
from dtl.data.shards.mirror import Unreachable
from dtl.data.sources.base import Source
from dtl.data.sources.splits import NoSplit
from dtl.errors import UserError
from dtl.text import Log, to_stdout


@dataclass(frozen=True)
class Splits:
    train: Shards
    val: Shards
    test: Shards | None = None

    def all(self) -> dict[str, Shards]:
        """By name; without a test set where there is none."""
        found = {"train": self.train, "val": self.val}
        return found if self.test is None else {**found, "test": self.test}

    def ids(self) -> dict[str, str]:
        """Dataset ids by split."""
        return {name: shards.dataset_id for name, shards in self.all().items()}

    def places(self) -> dict[str, str]:
        """The folder of each split, for the other processes of the node."""
        return {name: str(shards.folder) for name, shards in self.all().items()}


def open_splits(
    data: DataConfig, *, labelled: bool = True, progress: bool = True, log: Log = to_stdout, leads: bool = True, found: Mapping[str, str] | None = None
) -> Splits:
    """The splits that a config names, packed into the cache where they are not yet; UserError where they do not go together.

    `found`: `places` of another process of this node that has opened the same just now.
    """
    assert data.train is not None
    listed: dict[str, Source] = {}
    one = partial(open_split, options=data, labelled=labelled, progress=progress, log=log, leads=leads)
    if found is not None:
        opened = {name: one(getattr(data, name) or data.train, split=name, found=place) for name, place in found.items()}
        return Splits(**opened)
    train = one(data.train, split="train", listed=listed)
    own = partial(one, options=data.model_copy(update={"val_fraction": 0.0}), classes=train.classes)  # of a source that is named by itself
    val = own(data.val, split="val") if data.val is not None else one(data.train, split="val", listed=listed)
    test = own(data.test, split="test") if data.test is not None else _test_of_train(one, data.train, train, listed)
    check_class_maps(train.manifest, val.manifest)
    if val.folder == train.folder:
        raise UserError(f"{data.train}: no validation data; give --data.val FOLDER, or --data.val-fraction 0.1")
    if test is not None:
        check_class_maps(train.manifest, test.manifest, split="test")
        if content_id(test) == content_id(val):
            if data.test is not None:
                raise UserError(f"data.test {data.test} holds the validation images, which choose the weights: give images that choose nothing")
            test = None
    return Splits(train, val, test)


def _test_of_train(one: partial[Shards], source: str, train: Shards, listed: dict[str, Source]) -> Shards | None:
    """The test set that a training source has of its own; None where it has none."""
    try:
        found = one(source, split="test", listed=listed)
    except (NoSplit, Unreachable):  # of a server that was there for train, so a test set would have been copied before
        return None
    return None if found.folder == train.folder else found


def content_id(shards: Shards) -> str:
    """A hash of the images alone, in whatever order, folders and classes they are."""
    images = np.empty(shards.num_samples, [("size", "<u4"), ("crc", "<u4")])
    images["size"], images["crc"] = shards.sizes, shards.crcs
    return hashlib.sha256(np.sort(images).tobytes()).hexdigest()[:32]
