"""Exact metrics of a trained model on a set of images: what `dtl evaluate` and `dtl.evaluate` do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dtl.config.models import DataConfig, GroupConfig, num_pixels
from dtl.config.own import StoredConfig, stored_config
from dtl.data.groups import Groups, find_groups
from dtl.data.open import check_reading, open_split
from dtl.data.shards.index import Shards, is_packed
from dtl.data.shards.mirror import Unreachable
from dtl.data.sources.splits import HasSplits, NoSplit
from dtl.data.splits_of_run import content_id, open_splits
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.files import expand_home
from dtl.inference.assess import NUM_HARDEST, Assessment, RankBatches, assess, assess_groups, readable
from dtl.inference.model import RunningModel
from dtl.inference.tables import report, write_csv
from dtl.models.strict_load import strict_load
from dtl.runs.looks import count_looks, note_look
from dtl.text import Log, counted, some, to_nobody
from dtl.training.dataloaders import choose_workers, rank_cores
from dtl.training.evaluate import STATISTICS_BATCH, STATISTICS_IMAGES, estimate_statistics

Split = Literal["val", "test"]


def evaluate(
    model: RunningModel,
    data: str | None = None,
    *,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    allow_pipe: bool = False,
    hardest: int = NUM_HARDEST,
    csv: str | None = None,
    flip: bool = False,
    by_group: bool = False,
    group: GroupConfig | None = None,
    log: Log = to_nobody,
) -> dict[str, Any]:
    """All numbers as JSON values, the same on every rank. `data`: any source of images; by default the run's `split`. A test set's has `look`:
    which look at it this is, of all runs beside the model's.

    `workers`: loader processes of this rank; None: as in the run, else auto. `allow_pipe`: run the commands that the manifest of `data` names.
    `hardest`: how many images of the greatest loss are listed. `csv`: a file to be written, one line per image.
    `flip`: average the probabilities of each image and its mirror image. `by_group`: measure groups of images too, each by the mean of its images'
    probabilities; `group` says which they are, by default the run's data.group. UserError for data that does not go with the model.
    """
    runtime, stored = model.runtime, model.stored
    shards, workers = open_images(model, data, split, batch_size=batch_size, workers=workers, on_error=on_error, allow_pipe=allow_pipe, log=log)
    groups = groups_of_images(model, shards, data, split, given=group, by_group=by_group)
    batches = RankBatches(shards, stored.transform, batch_size=batch_size, workers=workers, runtime=runtime)
    seen = assess(
        model.forward,
        batches,
        task=stored.task,
        num_outputs=len(stored.classes),
        skip_damaged=on_error == "skip",
        num_hardest=hardest,
        flip=flip,
        groups=groups.codes if by_group and groups is not None else None,
    )
    with runtime.together("looks"):
        look = note_test_look(model, shards, split) if runtime.is_main else None
    with runtime.together("--csv"):
        if csv is not None and runtime.is_main:
            write_csv(csv, seen, shards, stored.classes)
    return {
        **report(seen, shards, classes=stored.classes, names=stored.shown_names, groups=None if groups is None else groups.codes),
        "model": str(stored.folder),
        "data": {"folder": str(shards.folder), "dataset_id": shards.dataset_id},
        "precision": runtime.precision,
        **({} if stored.facts.calibration is None else {"temperature": stored.temperature, "threshold": stored.threshold}),
        **({} if seen.groups is None or groups is None else {"by_group": _of_groups(seen, groups, shards, model)}),
        **({} if (look := runtime.agree(look)) is None else {"look": look}),
    }


def with_statistics(model: RunningModel, tensors: dict[str, Tensor], norms: Sequence[str], data: str, *, log: Log) -> dict[str, Tensor]:
    """`tensors`, weights of the model's network, with the running statistics that its batch norms `norms` have on images of `data`, as `after: blend`
    estimates them. UserError for data that does not go with the model, and for damaged images. For one process."""
    shards, workers = open_images(model, data, "val", batch_size=STATISTICS_BATCH, workers=None, on_error="fail", allow_pipe=False, log=log)
    batches = RankBatches(shards, model.stored.transform, batch_size=STATISTICS_BATCH, workers=workers, runtime=model.runtime, shuffle=True)
    num, module = min(batches.num_batches, STATISTICS_IMAGES // STATISTICS_BATCH), model.stored.network.module
    strict_load(module, tensors, "the mean of the models")
    with closing(iter(batches)) as stream:  # type: ignore[type-var]
        some = ([batch] for batch in islice(readable(stream, skip_damaged=False), num))
        estimate_statistics(model.forward, module, norms, num, some, stops=lambda _: False)
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def open_images(
    model: RunningModel,
    data: str | None,
    split: Split,
    *,
    batch_size: int,
    workers: int | None,
    on_error: Literal["fail", "skip"],
    allow_pipe: bool,
    log: Log,
) -> tuple[Shards, int]:
    """What an evaluation reads, and with how many loader processes a rank: see `evaluate`."""
    runtime = model.runtime
    with runtime.together("data"):
        run = stored_config(model.run) if model.run is not None else None
        source = _source(model, data, run, split, on_error, allow_pipe)
    shards = _open(source, split, model, log)
    wanted = workers if workers is not None else run.config.data.workers if run is not None else "auto"
    return shards, choose_workers(
        wanted, runtime, rank_cores(runtime), batch_bytes=model.stored.transform.reading.channels * num_pixels(model.stored.transform.image_size) * batch_size
    )


@dataclass(frozen=True)
class _Source:
    """What to evaluate on, and how it is packed: as training packed it, so that its cache is used again."""

    place: str
    options: DataConfig
    is_own_set: bool = True
    """Its classes must be the model's; else it is a split of the training set, which has them."""


def _source(model: RunningModel, data: str | None, run: StoredConfig | None, split: Split, on_error: Literal["fail", "skip"], allow_pipe: bool) -> _Source:
    own = DataConfig() if run is None else run.config.data
    own = own.model_copy(update={"allow_pipe": own.allow_pipe or allow_pipe})
    if data is not None:
        # Display names are the model's; those of training need not fit here.
        return _Source(data, own.model_copy(update={"on_error": on_error, "val_fraction": 0.0, "names": None}))
    if run is None:
        raise UserError(f"{model.stored.folder} is a model folder, which does not record its data; give --data.val SRC, or the run itself (runs/NAME)")
    run.require(f"data.{split}")
    named = own.val if split == "val" else own.test
    if named is not None and own.audit is None:
        return _Source(named, own.model_copy(update={"val_fraction": 0.0}))
    run.require("data.train", "data.val", "data.test", "data.group.regex")
    if own.train is None:
        raise UserError(f"{run.origin} has no data.train; give --data.val SRC")
    return _Source(own.train, own, is_own_set=False)


def _open(source: _Source, split: Split, model: RunningModel, log: Log) -> Shards:
    """The images, whose labels must mean the model's classes; a folder of images is packed into the cache first."""
    runtime, classes = model.runtime, model.stored.classes
    own_labels = model.stored.task.name == "classify"
    shown = log if runtime.is_main else to_nobody

    def opened(found: str | None = None) -> Shards:
        if not source.is_own_set and found is None and (val := _packed_val(source, split, runtime, shown, labelled=own_labels)) is not None:
            return val
        if not source.is_own_set and found is None:
            splits = open_splits(source.options, labelled=own_labels, progress=runtime.is_main, log=shown, leads=runtime.local_rank == 0).all()
            if split not in splits:
                raise UserError(f"{model.run} has no test set: {source.place} has none, and data.test is not set; measure other images with --data.val SRC")
            return splits[split]
        return open_split(
            source.place,
            source.options,
            split=split,
            classes=classes if own_labels and source.is_own_set else None,
            progress=runtime.is_main,
            log=shown,
            leads=runtime.local_rank == 0,
            found=found,
        )

    with runtime.together("data"):
        (folder,) = runtime.once_a_node(lambda: [str(opened().place)])
        shards = opened(folder)
        if own_labels:
            _check_classes(source.place, shards.classes, classes)
        if shards.num_samples == 0:
            raise UserError(f"{source.place} holds no images to evaluate on")
        for line in check_reading(model.stored.transform.reading, {source.place: shards}):
            shown(line)
    runtime.same("the test data" if split == "test" else "the validation data", shards.dataset_id)
    return shards


def groups_of_images(
    model: RunningModel, shards: Shards, data: str | None, split: Split, *, given: GroupConfig | None = None, by_group: bool = False
) -> Groups | None:
    """The groups of `open_images`: where they are asked for, and for the run's own images where it has data.group, because intervals draw whole groups."""
    with model.runtime.together("groups"):
        run, classifies = stored_config(model.run) if model.run is not None else None, model.stored.task.name == "classify"
        if not by_group and (data is not None or run is None or run.config.data.group is None or not classifies):
            return None
        if given is None and run is not None:
            run.require("data.group.regex")
            given = run.config.data.group
        if given is None:
            raise UserError("--by-group: which images belong together is not known; give --group-regex R, or train with data.group")
        if not classifies:
            raise UserError(f"--by-group: the model was trained for the task {model.stored.task.name}, which has several answers for each image")
        if data is not None or run is None:
            return find_groups(shards, given, str(data or shards.folder))
        own = run.config.data
        return find_groups(shards, given, str((own.val if split == "val" else own.test) or own.train), columns=own.columns)


def _of_groups(seen: Assessment, groups: Groups, shards: Shards, model: RunningModel) -> dict[str, Any]:
    """The metrics of groups as JSON values."""
    classes, sums = model.stored.classes, seen.groups
    assert sums is not None
    mixed = np.flatnonzero((sums.counts > 0) & (sums.lowest != sums.highest))
    if len(mixed):
        first = int(mixed[0])
        raise UserError(
            f"--by-group: {counted(len(mixed), 'group')} with images of more than one class, so that there is no one right answer: '{groups.names[first]}' has "
            f"'{classes[sums.lowest[first]]}' and '{classes[sums.highest[first]]}'"
        )
    found = report(assess_groups(sums, model.forward, num_outputs=len(classes)), shards, classes=classes, names=model.stored.shown_names)
    return {key: value for key, value in found.items() if key not in ("classes", "hardest", "damaged", "num_samples")} | {"num_groups": found["num_samples"]}


def note_test_look(model: RunningModel, shards: Shards, split: Split) -> int | None:
    """Which look at this test set it is; None where it is none, or the model is of no run. `--data.val` may name a test set, too."""
    weights = model.stored.facts.weights
    if model.run is None or weights is None:
        return None
    content = content_id(shards)
    if split != "test" and not count_looks(model.run.parent, content):
        return None
    return note_look(model.run, content, weights=weights.sha256, step=int(model.stored.facts.made_by.get("step") or 0))


def _packed_val(source: _Source, split: Split, runtime: Runtime, log: Log, *, labelled: bool) -> Shards | None:
    """Validation images that were packed as such, without a look at the training images; None where they may be held out of these."""
    data = source.options
    if split != "val" or data.test_fraction or data.fold is not None or data.audit is not None or (data.val_fraction and data.group is not None):
        return None
    try:
        shards = open_split(source.place, data, split="own val", labelled=labelled, progress=runtime.is_main, log=log, leads=runtime.local_rank == 0)
    except (NoSplit, HasSplits, Unreachable):
        return None
    return None if is_packed(expand_home(source.place)) else shards


def _check_classes(source: str, found: Sequence[str], known: Sequence[str]) -> None:
    """Label numbers must mean the same names: otherwise all would be scored against wrong classes in silence."""
    if tuple(found) == tuple(known):
        return
    unknown = [name for name in found if name not in set(known)]
    missing = [name for name in known if name not in set(found)]
    if unknown:
        what = f"it has {some(unknown, limit=6, quoted=True)}, which the model does not have"
    elif missing:
        what = f"it was packed without {some(missing, limit=6, quoted=True)}, so its label numbers stand for other classes"
    else:
        at = next(i for i, (a, b) in enumerate(zip(found, known)) if a != b)
        what = f"their order differs: label {at} is '{found[at]}' there and '{known[at]}' in the model"
    raise UserError(
        f"{source}: its classes are not the model's {some(known, limit=6, quoted=True)}: {what}; "
        "give the images themselves, or pack them with the model's classes (`dtl pack SRC DST --classes-from TRAIN_SHARDS`)"
    )
