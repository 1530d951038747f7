"""The splits of one run: what it trains on, what chooses its weights, and what is measured once at its end.

Each is named by the config, or a split that data.train has of its own, or held out of the training images. What is held out is a part of the packed
training images (see `dtl.data.shards.part`), decided by content: so it works for folders, lists, packed shards and tars, here and elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dtl import keyed
from dtl.config.models import DataConfig, FoldConfig
from dtl.data.audited import Actions, described, hand_on, honour, joined, ledger, place_of, read_actions
from dtl.data.groups import Groups, find_groups, folds_by_group, refuse_broken, split_by_group
from dtl.data.open import cache_lock, open_split
from dtl.data.remote.address import cache_place
from dtl.data.shards.index import Shards, is_packed, write_part
from dtl.data.shards.manifest import check_class_maps
from dtl.data.shards.mirror import Unreachable
from dtl.data.shards.part import PART_NAME
from dtl.data.sources.base import Source
from dtl.data.sources.content_split import folds_by_content, split_by_content
from dtl.data.sources.splits import HasSplits, NoSplit
from dtl.errors import UserError
from dtl.files import expand_home
from dtl.text import Log, counted, to_stdout

_VERSION = 2  # of how images are chosen
_NO_VAL = "no validation data; give --data.val FOLDER, or --data.val-fraction 0.1"
VAL_FRACTION, LEAST_VAL = 0.1, 20  # of training images, where there is a test set and no validation set


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
        """Where each split is opened again, for the other processes of the node."""
        return {name: str(shards.place) for name, shards in self.all().items()}


def open_splits(
    data: DataConfig,
    *,
    labelled: bool = True,
    progress: bool = True,
    log: Log = to_stdout,
    notes: Log | None = None,
    leads: bool = True,
    found: Mapping[str, str] | None = None,
) -> Splits:
    """The splits that a config names, packed into the cache where they are not yet; UserError where they do not go together.

    `notes` takes the lines about what is held out; by default `log` does. `found`: `places` of another process of this node that has opened the same just now.
    """
    assert data.train is not None
    one = partial(open_split, labelled=labelled, progress=progress, log=log, leads=leads)
    if found is not None:
        return Splits(**{name: one(getattr(data, name) or data.train, data, split=name, found=place) for name, place in found.items()})
    return _Opening(data, one, log, notes or log).splits()


class _Opening:
    """How the splits of a config are found, by one process of each node."""

    def __init__(self, data: DataConfig, one: partial[Shards], log: Log, notes: Log) -> None:
        assert data.train is not None
        self.data, self.source, self.one, self.log, self.notes = data, data.train, one, log, notes
        self.options = data.model_copy(update={"val_fraction": 0.0})
        self.actions = None if data.audit is None else read_actions(data.audit)
        self.listed: dict[str, Source] = {}

    def splits(self) -> Splits:
        data, fold = self.data, self.data.fold
        train, val = self._as_packed()
        test = self._named("test", train) if data.test is not None else self._of_train("test", train)
        if fold is not None and fold.number and test is not None:
            self.notes(f"the test set is fold {fold.number} of {fold.of}: left out {counted(test.num_samples, 'test image')} that {self.source} has of its own")
            test = None
        if data.val is not None:
            val = self._named("val", train)
        if test is not None and data.test_fraction:
            raise UserError(f"{self.source} has a test set of its own: leave out data.test_fraction, or set data.train to the images of one split")
        if test is not None and data.test is None and val is not None and content_id(test) == content_id(val):
            test = None  # data.val names it: the user wants it to choose
        shares: dict[str, float | None] = {"test": data.test_fraction} if data.test_fraction else {}
        if fold is not None and fold.number:
            shares["test"] = 1 / fold.of
        if val is None and (data.val_fraction or test is not None or shares or fold is not None):
            shares["val"] = data.val_fraction or None
        held_out = self._hold_out(train, shares) if shares else {"train": train}
        val, test = held_out.get("val", val), held_out.get("test", test)
        if val is None:
            raise UserError(f"{self.source}: {_NO_VAL}")
        splits = Splits(held_out["train"], val, test)
        if self.actions is not None:
            self.actions.check(self.source)
            line = described([entry for shards in splits.all().values() for entry in ledger(shards)])
            self.notes(f"data.audit {self.data.audit}: {line or 'no action is set, so all images stay as they are'}")
        self._check(splits)
        self._check_groups(splits, held_out)
        return splits

    def _as_packed(self) -> tuple[Shards, Shards | None]:
        """Training images, and the validation images that their source has of its own, or that packing splits off."""
        together = self.data.group is not None or self.data.fold is not None or self.data.audit is not None
        if self.data.val_fraction and not self.data.test_fraction and not together:
            try:
                train = self.one(self.source, self.data, split="train", listed=self.listed)
            except HasSplits:
                if (own := self._of_train("val", self.one(self.source, self.options, split="train", listed=self.listed))) is not None:
                    raise
                assert own is None
            else:
                return train, self._of_train("val", train, options=self.data)
        train = self.train()
        val = None if self.data.val is not None else self._of_train("val", train)
        if val is not None and self.data.val_fraction:
            raise UserError(f"{self.source} already has validation images: leave out data.val_fraction, or set data.train to the images of one split")
        return train, val

    def train(self) -> Shards:
        return self._audited("train", self.one(self.source, self.options, split="train", listed=self.listed))

    def every_image(self) -> dict[str, Shards]:
        train = self.train()
        found = {"train": train}
        for split in ("val", "test"):
            shards = self._named(split, train) if getattr(self.data, split) is not None else self._of_train(split, train)
            if shards is not None and all(shards.place != other.place for other in found.values()):
                found[split] = shards
        for split, shards in found.items():
            check_class_maps(train.manifest, shards.manifest, split=split)
        if self.actions is not None:
            self.actions.check(self.source)
        return found

    def _named(self, split: str, train: Shards) -> Shards:
        found = self._audited(split, self.one(getattr(self.data, split), self.options, split=split, classes=train.classes))
        if found.folder == train.folder:
            if split == "val":
                raise UserError(f"{self.source}: {_NO_VAL}")
            raise UserError(f"data.test {self.data.test} holds the training images: give images that choose nothing")
        return found

    def _of_train(self, split: str, train: Shards, *, options: DataConfig | None = None) -> Shards | None:
        """A split that the source of the training images has, too; None where it has none."""
        if is_packed(expand_home(self.source)):
            return None
        try:
            found = self.one(self.source, options or self.options, split=f"own {split}", listed=self.listed)
        except (NoSplit, Unreachable):  # of a server that was there for train, so that another split would have been copied then
            return None
        return None if found.folder == train.folder else self._audited(split, found)

    def _audited(self, split: str, shards: Shards) -> Shards:
        """What data.audit leaves of images that were just opened."""
        if self.actions is None:
            return shards
        home = place_of(cache_place(self.data.cache_dir, shared=self.data.cache_shared) / "parts", shards, split, self.actions)
        home.parent.parent.mkdir(exist_ok=True)
        with cache_lock(home.parent.with_name(home.parent.name + ".lock"), f"applies {self.data.audit} to {self.source}", self.log):
            changed = honour(shards, split, self.actions, home)
        return self.one(self.source, self.options, split="train", found=home) if changed else shards

    def _hold_out(self, train: Shards, shares: Mapping[str, float | None]) -> dict[str, Shards]:
        """The training images in parts: a share of them for each name, in this order, and the rest as train. None: the usual share for validation."""
        groups = groups_of(train, "train", self.data, self.source, self.actions)
        fold = self.data.fold if self.data.fold is not None and self.data.fold.number else None
        digest = None if groups is None else groups.digest
        facts: list[object] = [_VERSION, digest, str(train.folder.absolute()), train.dataset_id, dict(shares), VAL_FRACTION, LEAST_VAL]
        facts += [] if fold is None else [fold.model_dump()]
        home = cache_place(self.data.cache_dir, shared=self.data.cache_shared) / "parts" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
        names = ("train", *shares)
        if not all((home / name / PART_NAME).is_file() for name in names):
            home.parent.mkdir(exist_ok=True)
            with cache_lock(home.with_name(home.name + ".lock"), f"splits {self.source}", self.log):
                for name, chosen in chosen_parts(train, shares, groups, fold).items():
                    if name == "train":
                        hand_on(train, home / name)
                    write_part(train, chosen, home / name)
        opened = {name: self.one(self.source, self.options, split="train", found=home / name) for name in names}
        for name in shares:
            what = {"val": "validation", "test": "test"}[name]
            if name == "test" and fold is not None:
                why = f": fold {fold.number} of {fold.of}"
            elif shares[name] is not None:
                why = ""
            elif self.data.fold is not None and fold is None:
                why = ", as in each fold"
            else:
                why = ", because there are test images and no validation images, and test images choose nothing"
            some = f"{opened[name].num_samples:,} of {counted(train.num_samples, 'training image')}"
            how = "stratified" if groups is None else _reached(opened[name], train, groups)
            self.notes(f"{some} ({opened[name].num_samples / train.num_samples:.1%}, {how}) are used as {what} images{why}")
        return opened

    def _check(self, splits: Splits) -> None:
        check_class_maps(splits.train.manifest, splits.val.manifest)
        if splits.test is None:
            return
        check_class_maps(splits.train.manifest, splits.test.manifest, split="test")
        if content_id(splits.test) == content_id(splits.val):
            raise UserError(f"data.test {self.data.test} holds the validation images, which choose the weights: give images that choose nothing")

    def _check_groups(self, splits: Splits, held_out: Mapping[str, Shards]) -> None:
        """Splits that were not made here may have a group in common."""
        if len(held_out) == len(splits.all()):
            return
        found = splits.all()
        named = {name: str(getattr(self.data, name) or self.source) for name in found}
        groups = {name: (shards, of) for name, shards in found.items() if (of := groups_of(shards, name, self.data, named[name], self.actions)) is not None}
        line = refuse_broken(groups)
        if line is None:
            return
        if self.data.group_check == "refuse":
            raise UserError(f"{line}; move each group into one split, or train all the same with --data.group-check warn")
        self.notes(f"{line}: results on such images are too good")


def open_training(data: DataConfig, *, progress: bool, log: Log) -> tuple[Shards, Groups | None]:
    """All training images, of which folds are made, and their groups."""
    assert data.train is not None
    opening = _Opening(data, partial(open_split, progress=progress, log=log), log, log)
    train = opening.train()
    return train, groups_of(train, "train", data, data.train, opening.actions)


def open_every_image(data: DataConfig, *, log: Log) -> dict[str, Shards]:
    """All splits that a source has or a config names, with nothing held out; there may be training images only."""
    assert data.train is not None
    opening = _Opening(data, partial(open_split, log=log), log, log)
    return opening.every_image()


def groups_of(shards: Shards, split: str, data: DataConfig, source: str, actions: Actions | None = None) -> Groups | None:
    """The groups of data.group, with those together that data.audit joins; None where neither is given."""
    groups = None if data.group is None else find_groups(shards, data.group, source, columns=data.columns)
    return groups if actions is None or not actions.groups() else joined(groups, [shards.name(sample) for sample in range(shards.num_samples)], split, actions)


def _reached(part: Shards, train: Shards, groups: Groups) -> str:
    """How well a part of whole groups is stratified."""
    mine = np.unique(groups.codes[np.searchsorted(train.numbers, part.numbers)])
    shares = [now / all_of_it for now, all_of_it in zip(part.manifest.class_counts, train.manifest.class_counts) if all_of_it]
    return f"{len(mine):,} of {counted(len(groups.names), 'group')}, {min(shares):.1%} to {max(shares):.1%} of a class"


def chosen_parts(
    shards: Shards, shares: Mapping[str, float | None], groups: Groups | None = None, fold: FoldConfig | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which samples [N] each part has: `train` those that no other has. Every sample is in exactly one, and so is every group.

    `fold`: these are the test images, whatever their share.
    """
    left, found = np.ones(shards.num_samples, bool), dict[str, npt.NDArray[np.bool_]]()
    hashes, labels = content_keys(shards), np.asarray(shards.labels)
    for name, share in shares.items():
        if name == "test" and fold is not None:
            found[name] = folds_of(shards, fold, groups) == fold.number
            left = ~found[name]
            continue
        count = int(left.sum())
        fraction = min(0.5, max(VAL_FRACTION, LEAST_VAL / count)) if share is None else share * shards.num_samples / count
        chosen = np.zeros(shards.num_samples, bool)
        if groups is None:
            chosen[left] = split_by_content(hashes[left], labels[left], fraction, num_classes=shards.num_classes)
        else:
            mine, least = Groups(groups.codes[left], groups.names), min(LEAST_VAL, count // 2) if share is None else 0
            chosen[left] = split_by_group(mine, labels[left], fraction, num_classes=shards.num_classes, least=least)
        if not chosen.any():
            raise UserError("no class has two different images, so that none can be held out of the training images; give --data.val FOLDER")
        found[name], left = chosen, left & ~chosen
    return {"train": left, **found}


def folds_of(shards: Shards, fold: FoldConfig, groups: Groups | None = None) -> npt.NDArray[np.int64]:
    """The fold of each sample [N], from 1, whichever of them `fold` is."""
    labels = np.asarray(shards.labels)
    if groups is None:
        return 1 + folds_by_content(content_keys(shards), labels, fold.of, seed=fold.seed, classes=shards.classes)
    return 1 + folds_by_group(groups, labels, fold.of, seed=fold.seed, classes=shards.classes)


def content_keys(shards: Shards) -> npt.NDArray[np.uint64]:
    """One number for each image, the same for copies of one, wherever they lie: from its size, its CRC-32, its width and height."""
    widths, heights, _ = shards.shapes(exif=False)  # as stored: what is held out does not depend on how the images are read
    return keyed.keys(keyed.keys(shards.sizes, "size") ^ keyed.keys(shards.crcs, "crc") ^ keyed.keys(widths, "width") ^ keyed.keys(heights, "height"))


def content_id(shards: Shards) -> str:
    """A hash of the images alone, in whatever order, folders and classes they are."""
    images = np.empty(shards.num_samples, [("size", "<u4"), ("crc", "<u4")])
    images["size"], images["crc"] = shards.sizes, shards.crcs
    return hashlib.sha256(np.sort(images).tobytes()).hexdigest()[:32]
