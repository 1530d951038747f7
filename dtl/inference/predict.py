"""Probabilities for images, batch by batch, in the order of the images whatever the number of ranks and workers.

Batches are split the same way at any world size and dealt to the ranks in turn, so that memory stays small and results come out while the rest
is still being computed. B images, K classes, T best classes asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dtl.config.models import sides
from dtl.data.decoding.decode import NO_MEMORY, DecodeError
from dtl.data.loading.processes import end_processes, start_processes
from dtl.data.transforms.transforms import Transform
from dtl.distributed.runtime import Runtime
from dtl.inference.images import ImageInputs
from dtl.inference.model import RunningModel, StoredModel
from dtl.training.evaluate import ForwardPass

_ROUNDS_AT_ONCE = 8


_NOT_FINITE = "the network's outputs for it are not finite; try --precision no"


@dataclass(frozen=True)
class Prediction:
    """One image: its T best classes, or why it could not be read."""

    path: str
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str | None = None

    def to_json(self, model: StoredModel, *, lists: bool, digits: int | None = None) -> dict[str, Any]:
        """{path, label, name, probability} of the best class, with `lists` all T of them too; {path, problem} where it could not be read."""
        if self.problem is not None:
            return {"path": self.path, "problem": self.problem}
        names = model.facts.display_names
        named: list[dict[str, Any]] = []
        for number, value in zip(self.classes, self.probabilities):
            label = model.classes[number]
            named.append({"label": label, "name": names.get(label, label), "probability": value if digits is None else round(value, digits)})
        return {"path": self.path, **named[0], **({"predictions": named} if lists else {})}


@dataclass
class _Images:
    """One batch; an image that cannot be read has a problem instead of a row."""

    names: list[str]
    problems: list[str | None]
    images: Tensor
    """uint8 [readable, 3, H, W]"""

    def pin_memory(self) -> _Images:
        self.images = self.images.pin_memory()
        return self


class _Batches(Dataset[_Images]):
    """Item n: batch n of `batch_size` images."""

    def __init__(self, inputs: ImageInputs, transform: Transform, batch_size: int) -> None:
        self.inputs, self.transform, self.batch_size = inputs, transform, batch_size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __getitem__(self, number: int) -> _Images:
        numbers = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.inputs)))
        images = torch.empty((len(numbers), self.transform.reading.channels, *sides(self.transform.image_size)), dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        problems: list[str | None] = []
        row = 0
        for image in numbers:
            problems.append(fill(self.inputs, image, self.transform, images[row]))
            row += problems[-1] is None
        return _Images([self.inputs.name(image) for image in numbers], problems, images[:row])


def fill(inputs: ImageInputs, number: int, transform: Transform, out: Tensor) -> str | None:
    """Write an image as the network sees it into `out`, uint8 [C,H,W]; returns why it cannot be read."""
    try:
        pixels = inputs.pixels(number, transform.reading)
    except DecodeError as error:
        return str(error)
    except MemoryError:
        return NO_MEMORY
    height, width = pixels.shape[:2]
    draws = transform.draw([number], [width], [height], seed=0, epoch=0)
    transform.apply(pixels, draws, 0, out)
    return None


def predict(
    model: RunningModel, inputs: ImageInputs, *, top: int = 1, batch_size: int = 64, workers: int = 2, flip: bool = False
) -> Generator[list[Prediction], None, None]:
    """All predictions in the order of `inputs`, on the main process; the other ranks get empty lists. All ranks must exhaust it."""
    forward, runtime, top = model.forward, model.runtime, min(top, len(model.stored.classes))
    batches = _Batches(inputs, model.stored.transform, batch_size)
    numbers = range(runtime.rank, len(batches), runtime.world_size)
    pinned = runtime.device.type == "cuda"
    mine = start_processes(
        lambda options: iter(DataLoader(batches, sampler=numbers, batch_size=None, pin_memory=pinned, **options)), min(workers, len(numbers))
    )
    rounds = -(-len(batches) // runtime.world_size)
    try:
        for first in range(0, rounds, _ROUNDS_AT_ONCE if runtime.world_size > 1 else 1):
            last = min(rounds, first + _ROUNDS_AT_ONCE) if runtime.world_size > 1 else first + 1
            done = [_predicted(forward, next(mine), top, flip) if _number(turn, runtime) < len(batches) else [] for turn in range(first, last)]
            of_ranks = runtime.gather(done)
            if runtime.is_main:
                yield [one for turn in range(last - first) for of_rank in of_ranks for one in of_rank[turn]]
            else:
                yield []
    finally:
        end_processes(mine)


def _number(turn: int, runtime: Runtime) -> int:
    return turn * runtime.world_size + runtime.rank


def _probabilities(forward: ForwardPass, batch: _Images, flip: bool) -> Tensor:
    return (forward.flipped(batch.images) if flip else forward(batch.images)).softmax(dim=1)


def predict_groups(
    model: RunningModel, inputs: ImageInputs, group: Callable[[str], str], *, top: int = 1, batch_size: int = 64, workers: int = 2, flip: bool = False
) -> tuple[list[Prediction], list[Prediction]]:
    """One prediction per group of images, by the mean of their probabilities, in the order in which groups first come; and the images that could not be read.

    `group`: from an image's name to the group's. Sums are integers, in units of 2^-32, so that they are the same at any number of ranks. The same on all ranks.
    """
    runtime, batches = model.runtime, _Batches(inputs, model.stored.transform, batch_size)
    numbers = range(runtime.rank, len(batches), runtime.world_size)
    mine = start_processes(lambda options: iter(DataLoader(batches, sampler=numbers, batch_size=None, **options)), min(workers, len(numbers)))
    sums: dict[str, tuple[Tensor, int]] = {}
    problems: list[tuple[int, Prediction]] = []
    try:
        with runtime.together("images"):
            for number in numbers:
                batch = next(mine)
                readable = [name for name, problem in zip(batch.names, batch.problems) if problem is None]
                problems += [(number, Prediction(name, problem=problem)) for name, problem in zip(batch.names, batch.problems) if problem is not None]
                if not readable:
                    continue
                for name, row in zip(readable, _probabilities(model.forward, batch, flip).cpu().double()):
                    if not bool(row.isfinite().all()):
                        problems.append((number, Prediction(name, problem=_NOT_FINITE)))
                        continue
                    total, count = sums.get(group(name), (torch.zeros_like(row, dtype=torch.int64), 0))
                    sums[group(name)] = (total + (row * 2.0**32).long(), count + 1)
    finally:
        end_processes(mine)
    merged: dict[str, tuple[Tensor, int]] = {}
    for part in runtime.gather(sums):
        for name, (row, count) in part.items():
            total, before = merged.get(name, (torch.zeros_like(row), 0))
            merged[name] = (total + row, before + count)
    found = []
    for name in dict.fromkeys(group(inputs.name(number)) for number in range(len(inputs))):
        if name in merged:
            total, count = merged[name]
            mean = total.double() / (count * 2.0**32)
            classes = model.forward.decide(mean.log()[None])[0].sort(descending=True, stable=True).indices
            values = mean[classes]
            found.append(Prediction(name, tuple(classes[:top].tolist()), tuple(values[:top].tolist())))
    unread = sorted((one for part in runtime.gather(problems) for one in part), key=lambda one: one[0])
    return found, [one for _, one in unread]


def _predicted(forward: ForwardPass, batch: _Images, top: int, flip: bool) -> list[Prediction]:
    rows: Iterator[tuple[list[int], list[float]]] = iter(())
    if len(batch.images):
        # Stable: of equal probabilities the first class wins, as in evaluation.
        probabilities = _probabilities(forward, batch, flip)
        values, classes = probabilities.sort(dim=1, descending=True, stable=True)
        if forward.threshold is not None:  # the predicted class first, whatever its probability
            classes = forward.decide(probabilities.log()).sort(dim=1, descending=True, stable=True).indices
            values = probabilities.gather(1, classes)
        rows = iter(list(zip(classes[:, :top].tolist(), values[:, :top].tolist())))
    found = []
    for name, problem in zip(batch.names, batch.problems):
        if problem is not None:
            found.append(Prediction(name, problem=problem))
        else:
            best, values_of = next(rows)
            finite = all(map(math.isfinite, values_of))  # bf16 and fp16 may overflow where the weights are finite
            found.append(Prediction(name, tuple(best), tuple(values_of)) if finite else Prediction(name, problem=_NOT_FINITE))
    return found
