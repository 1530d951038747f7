"""JPEGs decoded on the device: loader processes send the bytes, nvJPEG (through torchcodec) decodes them, and they are cropped there.

For machines with a strong GPU and few CPU cores. Loader processes decode everything that is not a plain JPEG (PNG, CMYK ...). Samples, draws and
boxes are the same; pixels differ by the rounding of another decoder and of a resize in float32. It also runs on a CPU, for tests.

nvJPEG's hardware path writes into memory that the caller's stream may still read (torchcodec#1634, vision#9606: seen on an H100). So decoding
has its own stream here, and comes first in each batch, when that stream is empty.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dtl.config.models import sides
from dtl.data.decoding.decode import MIRRORED, UPSIDE_DOWN, DecodeError, decode
from dtl.data.loading.batch import Batch
from dtl.data.transforms.geometry import clip_to_window
from dtl.data.transforms.transforms import Draws, Transform, jitter_strengths
from dtl.errors import DamagedSample, UserError

_STRONGEST = 32
AHEAD = 2
"""Batches that are decoded ahead of the trainer."""


class DeviceDecoder:
    """Decodes the JPEGs of batches on `device`, in its own thread and on its own stream, while the trainer computes.

    UserError if torchcodec is missing, or `transform` does more than crop, resize, flip and erase.
    """

    def __init__(self, transform: Transform, device: torch.device, damaged: Callable[[int, str], DamagedSample]) -> None:
        """`damaged(sample, reason)` describes a sample that cannot be decoded."""
        self._decode_jpeg = ready(transform, device)
        self._transform, self._device, self._damaged = transform, device, damaged
        self._stream: Any = _stream(device) if device.type == "cuda" else None
        self._index = device.index if device.type == "cuda" else None

    def finished(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, their images on the device."""
        pending: deque[Future[tuple[Batch, Any]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="device-decode", initializer=self._begin_thread) as pool:
            for batch in batches:
                pending.append(pool.submit(self._finish_marked, batch))
                if len(pending) > AHEAD:
                    yield self._hand_over(*pending.popleft().result())
            while pending:
                yield self._hand_over(*pending.popleft().result())

    def _begin_thread(self) -> None:
        """Threads start on GPU 0: whatever returns to that device, as the end of `torch.cuda.stream` does, makes a context there (0.5 GiB)."""
        if self._index is not None:
            torch.cuda.set_device(self._index)

    def _finish_marked(self, batch: Batch) -> tuple[Batch, Any]:
        """The finished batch, and the event after which its images are complete: by then the stream may have queued the next batch."""
        batch = self.finish(batch)
        if self._stream is None:
            return batch, None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return batch, event

    def _hand_over(self, batch: Batch, event: Any) -> Batch:
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            batch.images.record_stream(current)
        return batch

    def finish(self, batch: Batch) -> Batch:
        """Decode the batch's JPEGs, in place. A sample that cannot be decoded gets weight 0 and an entry in `bad`."""
        encoded, batch.encoded = batch.encoded, None
        if encoded is None:
            return batch
        if self._stream is not None:
            self._stream.synchronize()
        (height, width), num = sides(self._transform.image_size), len(batch.samples)
        with torch.inference_mode(False), torch.no_grad(), contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            # First, while nothing queued can still read memory that the decoder gets.
            pictures = self._pictures(list(torch.split(encoded.data, encoded.sizes)))
            images = torch.empty((num, 3, height, width), dtype=torch.uint8, device=self._device, memory_format=torch.channels_last).zero_()
            if encoded.decoded:
                images[torch.tensor(encoded.decoded, device=self._device)] = batch.images.to(self._device, non_blocking=True)
            for row, turn, picture in zip(encoded.rows, encoded.turns, pictures, strict=True):
                found: Tensor | str = _turned(picture, turn) if isinstance(picture, Tensor) else picture
                expected = (3, int(encoded.heights[row]), int(encoded.widths[row]))
                if isinstance(found, Tensor) and tuple(found.shape) != expected:
                    found = f"{found.shape[2]} x {found.shape[1]} pixels, but {expected[2]} x {expected[1]} according to the index"
                if isinstance(found, str):
                    sample = int(batch.samples[row])
                    batch.weights[row] = 0.0
                    batch.bad.append((sample, self._damaged(sample, found)))
                else:
                    place_on_device(found, encoded.draws, row, images[row], self._transform)
            num_real = len(encoded.heights)
            if num_real < num:
                images[num_real:] = images[torch.arange(num - num_real, device=self._device) % num_real]
        batch.images = images
        return batch

    def _pictures(self, pieces: list[Tensor]) -> list[Tensor | str]:
        """For each JPEG its pixels, uint8 [3,H,W], or why it has none."""
        if not pieces:
            return []
        try:
            return list(self._decode_jpeg(pieces, device=self._device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one damaged image fails all
            return [self._picture(piece) for piece in pieces]

    def _picture(self, piece: Tensor) -> Tensor | str:
        try:
            (picture,) = self._decode_jpeg([piece], device=self._device)
            return picture  # type: ignore[no-any-return]
        except RuntimeError:
            try:
                return (
                    torch.from_numpy(
                        decode(piece.numpy().tobytes(), max_pixels=1 << 32).copy()  # its size was checked before it came here
                    )
                    .to(self._device)
                    .permute(2, 0, 1)
                )
            except DecodeError as error:
                return str(error)


def _turned(picture: Tensor, orientation: int) -> Tensor:
    """`dtl.data.decoding.decode.turned` of [3,H,W]."""
    axes = [axis for axis, those in ((1, UPSIDE_DOWN), (2, MIRRORED)) if orientation in those]
    picture = picture.flip(axes) if axes else picture
    return picture.transpose(1, 2) if orientation >= 5 else picture


def ready(transform: Transform, device: torch.device) -> Any:
    """torchcodec's decoder. UserError if it is missing, does not work on `device`, or `transform` needs the loader processes."""
    _check(transform)
    try:
        from torchcodec.decoders import decode_jpeg  # type: ignore[import-not-found, attr-defined, unused-ignore]
    except ImportError as error:
        raise UserError(f"data.decode device needs the package torchcodec ({' '.join(str(error).split())[:200]}): pip install 'torchcodec>=0.16'") from None
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.decode device: torchcodec does not work with torch {torch.__version__} ({' '.join(str(error).split())[:200]}): "
            "install the torchcodec that was made for it, or a newer torch"
        ) from None
    _try(decode_jpeg, device)
    return decode_jpeg


@cache
def _stream(device: torch.device) -> Any:
    """One for all decoders of a device: PyTorch has 32 streams and then gives the first ones again."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _try(decode_jpeg: Any, device: torch.device) -> None:
    """Once for each device: without this, a decoder that always fails would look like damaged images, each decoded on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # as before each batch: nothing queued may still read memory that the decoder gets
    trial = torch.from_numpy(np.frombuffer(bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))), np.uint8))
    try:
        decode_jpeg([trial], device=device)
    except RuntimeError as error:
        raise UserError(
            f"data.decode device: torchcodec cannot decode on {device} ({' '.join(str(error).split())[:200]}); use --data.decode workers"
        ) from error


def _check(transform: Transform) -> None:
    augment = transform.augment
    if transform.reading.channels != 3:
        raise UserError(f"data.decode device decodes JPEGs, which have 3 channels, and data.channels is {transform.reading.channels}: use data.decode workers")
    if augment is None:
        return
    others = {
        "rotation": augment.rotation, "color_jitter": any(jitter_strengths(augment)), "grayscale": augment.grayscale,
        "randaugment": augment.randaugment, "trivial": augment.trivial, "function": augment.function,
    }  # fmt: skip
    names = [f"data.augment.{name}" for name, value in others.items() if value]
    if names:
        raise UserError(f"data.decode device supports crop, resize, flips, turns and erasing only; {' and '.join(names)} needs data.decode workers")


def place_on_device(picture: Tensor, draws: Draws, i: int, out: Tensor, transform: Transform) -> None:
    """`Transform.apply` on a device: write sample `i`, whose whole image is `picture` uint8 [3,H,W], into `out` uint8 [3,H,W]."""
    placement = draws.placement
    top, left, height, width = placement.boxes[i].tolist()
    crop = picture[:, top : top + height, left : left + width]
    resized = tuple(placement.resized[i].tolist())
    if (height, width) != resized:
        smooth = interpolate(_coarse(crop[None].float(), resized), size=resized, mode=transform.interpolation, align_corners=False, antialias=True)
        crop = smooth[0].round_().clamp_(0, 255).to(torch.uint8)
    seen, target = crop.permute(1, 2, 0), out.permute(1, 2, 0)
    flips = bool(draws.horizontal_flip[i]), bool(draws.vertical_flip[i])
    offset = tuple(placement.offsets[i].tolist())
    if offset != (0, 0) or seen.shape != target.shape:
        seen, target = clip_to_window(seen, target, offset, *flips, transform.fill)
    axes = [axis for axis, flip in zip((1, 0), flips, strict=True) if flip]
    target.copy_(seen.flip(axes) if axes else seen)
    if draws.turns is not None and draws.turns[i]:
        out.copy_(torch.rot90(out, int(draws.turns[i]), (1, 2)).clone())
    if draws.erase is not None and draws.erase[i, 2]:
        top, left, height, width = draws.erase[i].tolist()
        for channel, value in zip(out, transform.erase_fill, strict=True):
            channel[top : top + height, left : left + width].fill_(value)


def _coarse(crop: Tensor, size: tuple[int, ...]) -> Tensor:
    """[1,3,H,W] averaged down to at most `_STRONGEST` times `size`: CUDA's antialiasing kernel takes some fifty pixels for each output pixel."""
    factors = [max(1, -(-now // (_STRONGEST * wanted))) for now, wanted in zip(crop.shape[2:], size, strict=True)]
    return crop if max(factors) == 1 else interpolate(crop, size=[-(-now // factor) for now, factor in zip(crop.shape[2:], factors)], mode="area")
