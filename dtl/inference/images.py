"""Images as people name them for a prediction: files, folders, lists, packed shards, one after another in a fixed order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dtl.config.models import DataConfig
from dtl.data.decoding.decode import DecodeError, decode, pixels_of, probe
from dtl.data.decoding.headers import MAX_PIXELS
from dtl.data.open import packed_splits
from dtl.data.shards.index import MANIFEST_NAME, Shards, is_packed
from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import IMAGE_EXTENSIONS
from dtl.data.sources.list_file import list_text, looks_like_image, parse_list
from dtl.data.sources.near_paths import near_paths
from dtl.data.sources.splits import is_hidden
from dtl.data.sources.unread import data_set_of_others, describe_passed_over, extension_of
from dtl.errors import DamagedSample, UserError
from dtl.files import MAX_FILE_BYTES, open_regular, read_regular, user_path, without_path
from dtl.reading import Reading
from dtl.text import Log, counted, to_stderr

_LOOK_BYTES = 65_536
_SHOWN = 60


@dataclass(frozen=True)
class Files:
    """Image files by path."""

    paths: StringTable
    max_bytes: int = MAX_FILE_BYTES

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return self.paths[number]

    def read(self, number: int) -> bytes:
        """OSError where it cannot be read; UserError where it is not a regular file, or too large."""
        return read_regular(self.paths[number], max_bytes=self.max_bytes)


@dataclass(frozen=True)
class PackedImages:
    """Samples of packed shards, by the path that they were packed from."""

    shards: Shards
    order: np.ndarray
    """int64 [n] sample numbers in the order of their paths"""

    def __len__(self) -> int:
        return len(self.order)

    def name(self, number: int) -> str:
        return self.shards.name(int(self.order[number]))

    def read(self, number: int) -> bytes:
        """DamagedSample where it cannot be read."""
        (found,) = self.shards.read(self.order[number : number + 1])
        if isinstance(found, DamagedSample):
            raise found
        return found


@dataclass(frozen=True)
class InMemory:
    """One image that the caller holds: PIL, or uint8 [H, W, 1, 3 or 4]."""

    image: Image.Image | npt.NDArray[np.uint8]
    number: int
    """Its place among those given."""

    def __len__(self) -> int:
        return 1

    def name(self, number: int) -> str:
        return f"image {self.number}"

    def pixels(self, max_pixels: int, reading: Reading) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3], as of a file."""
        image = self.image
        if not isinstance(image, Image.Image):
            if image.shape[2] == reading.channels:
                return np.ascontiguousarray(image)
            image = Image.fromarray(np.ascontiguousarray(image if image.shape[2] > 1 else image[..., 0]))
        return pixels_of(image, max_pixels=max_pixels, reading=reading)


def in_memory(given: object, first: int, channels: int = 3) -> list[InMemory]:
    """The image or images (a batch) of a PIL image, an array [H, W] or [N, H, W, C], or a tensor [C, H, W] (as torchvision decodes) or [N, C, H, W].

    UserError for other shapes, and for pixels that are not uint8: their range is not known.
    """
    if isinstance(given, Image.Image):
        return [InMemory(given, first)]
    shape, kind = tuple(getattr(given, "shape", ())), type(given).__name__
    if isinstance(given, Tensor):
        layout, array = "[H, W], [C, H, W] or [N, C, H, W]", given.detach().cpu().numpy() if given.dtype == torch.uint8 else None
        array = array if array is None or array.ndim < 3 else np.moveaxis(array, -3, -1)
    elif isinstance(given, np.ndarray):
        layout, array = "[H, W], [H, W, C] or [N, H, W, C]", given if given.dtype == np.uint8 else None
    else:
        raise UserError(f"image {first} is a {kind}; give a path, a PIL image, an array or a tensor")
    if array is None:
        raise UserError(f"image {first} is a {kind} of {getattr(given, 'dtype', '')}; pixels are uint8, from 0 to 255, not normalised")
    array = array[:, :, None] if array.ndim == 2 else array
    known = (1, 3, 4) if channels in (1, 3) else (channels,)
    if array.ndim not in (3, 4) or array.shape[-1] not in known or array.size == 0:
        allowed = "1, 3 or 4 channels C" if len(known) > 1 else counted(channels, "channel")
        raise UserError(f"image {first} is a {kind} of shape {shape}; it must be {layout}, with {allowed}")
    return [InMemory(one, first + number) for number, one in enumerate([array] if array.ndim == 3 else array)]


@dataclass(frozen=True)
class ImageInputs:
    """All images that were named, numbered from 0; cheap to pickle, no object an image."""

    groups: tuple[Files | PackedImages | InMemory, ...]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def name(self, number: int) -> str:
        group, within = self._at(number)
        return group.name(within)

    def pixels(self, number: int, reading: Reading) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3], read as the network's training images were. DecodeError where the image cannot be had; the message is the reason."""
        group, within = self._at(number)
        if isinstance(group, InMemory):
            return group.pixels(self.max_pixels, reading)
        try:
            data = group.read(within)
        except OSError as error:
            raise DecodeError(error.strerror or str(error)) from None
        except DamagedSample as damage:
            raise DecodeError(damage.reason) from None
        except UserError as error:
            raise DecodeError(without_path(error)) from None
        return decode(data, max_pixels=self.max_pixels, reading=reading)

    def _at(self, number: int) -> tuple[Files | PackedImages | InMemory, int]:
        for group in self.groups:
            if number < len(group):
                return group, number
            number -= len(group)
        raise IndexError(number)


def find_images(places: Sequence[object], options: DataConfig = DataConfig(), log: Log = to_stderr, *, channels: int = 3) -> ImageInputs:
    """The images of all `places` in the order given: a folder's sorted by path, a list's as its lines come, - for a list on stdin.

    UserError for a place that does not exist or holds no image. Of the `options` those about sizes count. A file that a list names is not looked at here.
    `channels`: of images in memory.
    `log` gets a line about the files of each folder that are passed over.
    """
    groups: list[Files | PackedImages | InMemory] = []
    loose: list[str] = []
    held = 0
    for place in places:
        if not isinstance(place, str):
            if loose:
                groups.append(Files(StringTable.build(loose), options.max_file_bytes))
                loose = []
            images = in_memory(place, held, channels)
            held += len(images)
            groups += images
            continue
        if place == "-":
            group: Files | PackedImages | None = _listed("standard input", sys.stdin.read(), Path())
        else:
            group = _group(user_path(place), options, log)
        if group is None:
            loose.append(place)
            continue
        if loose:
            groups.append(Files(StringTable.build(loose), options.max_file_bytes))
            loose = []
        groups.append(group)
    if loose:
        groups.append(Files(StringTable.build(loose), options.max_file_bytes))
    limited = (replace(group, max_bytes=options.max_file_bytes) if isinstance(group, Files) else group for group in groups)
    inputs = ImageInputs(tuple(limited), options.max_pixels)
    if len(inputs) == 0:
        raise UserError(f"no images in {', '.join(map(str, places))}")
    return inputs


def _group(path: Path, options: DataConfig, log: Log) -> Files | PackedImages | None:
    """None for a single image file."""
    if path.is_dir():
        return _packed(path, options) if is_packed(path) else _folder(path, log)
    if not path.exists():
        raise UserError(f"{path} does not exist; give images, folders of images, list files or packed shards")
    if path.suffix.lower() == ".tar":
        raise UserError(f"{path} is a tar; give the folder with its {MANIFEST_NAME} (dtl index makes one for tars from other tools)")
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        return None
    return _list_file(path, options.max_file_bytes)


def _folder(folder: Path, log: Log) -> Files | PackedImages:
    held = [name for names in packed_splits(folder).values() for name in names]
    if held:
        raise UserError(f"{folder} holds packed shards of {', '.join(held)}; give one of them: {folder / held[-1]}")
    others: list[str] = []
    paths = StringTable.build(sorted(_walk(folder, others)))
    passed_over = describe_passed_over(others)
    if len(paths) == 0:
        why = data_set_of_others(folder) or passed_over
        raise UserError(f"{folder} holds no images{f' ({why})' if why else ''}; the supported extensions are {', '.join(sorted(IMAGE_EXTENSIONS))}")
    if passed_over:
        log(f"{folder}: {passed_over}")
    return Files(paths)


def _walk(folder: Path, others: list[str]) -> Iterator[str]:
    """Image files at any depth; hidden ones and links back to a folder above are skipped. The names of other files go to `others`."""
    seen: set[tuple[int, int]] = set()

    def troubled(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=troubled):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if is_hidden(name):
                continue
            if extension_of(name) in IMAGE_EXTENSIONS:
                yield os.path.join(place, name)
            else:
                others.append(name)


def _packed(folder: Path, options: DataConfig) -> PackedImages:
    shards = Shards.open(folder, options)
    names = [shards.name(sample) for sample in range(shards.num_samples)]
    return PackedImages(shards, np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))


def _list_file(path: Path, max_bytes: int) -> Files | None:
    """None where the file is an image after all, whatever its name ends in."""
    try:
        with open_regular(path) as file:
            start = file.read(_LOOK_BYTES)
        probe(start)
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except DecodeError as error:
        reason = str(error)
    try:
        text = list_text(path, max_bytes)
    except ValueError as problem:
        raise UserError(f"{path} is neither an image nor a list of images: {reason}; {problem}") from None
    return _listed(str(path), text, path.parent)


def _listed(source: str, text: str, folder: Path) -> Files:
    """The images that a list names. UserError for a text that is none, and where none of its images exists."""
    rows = parse_list(text, origin=source, folder=folder, labelled=False, paths_only=True)
    if not len(rows.lines):
        raise UserError(f"{source} lists no images; each line is a path, or CSV with a column path")
    # Missing images are reported one by one, beside the predictions of the others; but not where nothing else would be.
    numbers = range(len(rows.paths))
    if not any(os.path.isfile(folder / rows.paths[number]) for number in numbers):
        first = rows.paths[0]
        shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]} ..."
        hint = near_paths([(rows.paths[number], "") for number in numbers[:1000]], folder)
        if not hint and not any(looks_like_image(rows.paths[number]) for number in numbers):
            raise UserError(f"{source} is neither an image nor a list of images: no line is the path of an image (the first is '{shown}')")
        raise UserError(f"{source}: none of its {counted(len(numbers), 'image')} exists, as '{shown}'; paths are relative to {folder.absolute()}{hint}")
    return Files(rows.paths if folder == Path() else StringTable.build(os.path.join(folder, rows.paths[number]) for number in numbers))
