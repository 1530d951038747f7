"""Whether two images are the same photo: recompressed, resized, cropped by some percent, mirrored, or with other brightness; found by pixels alone.

Two steps. `thumbnails` are compared with all others by `dtl.data.near` (a perceptual hash that is not rounded to bits, so that nothing is lost at its edge);
`registered` then looks at each such pair: it moves, scales and mirrors one over the other, and compares what is left without low frequencies, in which
photos of one kind agree. The next shot of a scene has the same colours and other details.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dtl.data.near import Pairs

SIDE, FINE = 64, 128
"""Pixels of the images that `registered` compares, whatever their proportions: of each pair, and of a pair that agrees and is LARGE. Two photos of one kind
on an empty ground have the same outline, and other details."""
LARGE = 2 * FINE
"""The shorter side from which on the finer look is fair: each of its pixels is the mean of four or more, and the traces of compression are none."""
ALIKE = 0.85
"""Cosine of two thumbnails from which on a pair is looked at; in a set where that are too many, it is raised."""
SAME = 0.75
"""Correlation of the details from which on it is the same photo. Both numbers were chosen on CIFAR-10 (benchmarks/audit.py)."""
_THUMBNAIL = 8
_TEMPLATE = 44  # of SIDE
_SCALES = (64, 66, 68, 70, 73)
_BLUR = 9
_FLAT = 1e-3  # of the pixels' range: an image without details is like any other one


def gray(images: Tensor) -> Tensor:
    """uint8 [B,C,S,S] to float32 [B,S,S] in 0..1."""
    return images.float().mean(1) / 255


def thumbnails(images: Tensor) -> npt.NDArray[np.float32]:
    """[B, 64] of gray images [B,S,S]: their coarse pattern, without brightness and contrast."""
    small = functional.adaptive_avg_pool2d(images[:, None], _THUMBNAIL)[:, 0]
    small = small - small.mean((1, 2), keepdim=True)
    small = torch.where(small.abs().amax((1, 2), keepdim=True) < _FLAT, torch.zeros(()), small)
    found: npt.NDArray[np.float32] = small.flatten(1).numpy()
    return found


def with_mirrored(thumbs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[2N,64]: the thumbnails [N,64], and then their mirror images."""
    return np.concatenate([thumbs, thumbs.reshape(-1, _THUMBNAIL, _THUMBNAIL)[:, :, ::-1].reshape(len(thumbs), -1)])


def of_images(found: Pairs, number: int) -> Pairs:
    """Pairs of `with_mirrored` of so many images, as pairs of images: each once, with the higher cosine."""
    first, second = found.first % max(1, number), found.second % max(1, number)
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((-found.cosine, high, low))
    low, high, cosine = low[order], high[order], found.cosine[order]
    begins = np.ones(len(low), bool)
    begins[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    kept = begins & (low < high)  # a symmetric image is its own mirror image
    return Pairs(low[kept], high[kept], cosine[kept])


def registered(one: Tensor, other: Tensor) -> float:
    """How well the details of two gray images [S,S] agree, the one laid over the other: at most 1."""
    return max(_laid_over(one, other), _laid_over(other, one))


def _laid_over(wide: Tensor, narrow: Tensor) -> float:
    side = len(wide)
    size = _TEMPLATE * side // SIDE
    edge = (side - size) // 2
    template = _details(narrow)[edge:-edge, edge:-edge]
    template = template - template.mean()
    norm = template.norm()
    if norm < _FLAT * size:
        return 0.0
    area = torch.ones_like(template)
    kernels = torch.stack([template / norm, template.flip(1) / norm, area])
    best = 0.0
    for scale in _SCALES:
        scaled = functional.interpolate(wide[None, None], [scale * side // SIDE] * 2, mode="bilinear", align_corners=False, antialias=True)
        details = _details(scaled[0, 0])
        straight, mirrored, total = _sums(details, kernels)
        energy = _sums(details.square(), area[None])[0] - total.square() / area.numel()
        best = max(best, float((torch.maximum(straight, mirrored) / energy.clamp(min=(_FLAT * size) ** 2).sqrt()).max()))
    return best


def _sums(image: Tensor, kernels: Tensor) -> Tensor:
    """[K,P,P]: what each kernel [K,T,T] and the image [S,S] under it have in common, at all P x P places.

    By Fourier transforms, as templates are large; NumPy's, because threads of torch's take longer over images as small as these.
    """
    size, places = tuple(image.shape), len(image) - kernels.shape[1] + 1
    spectrum = np.fft.rfft2(image.numpy()) * np.fft.rfft2(kernels.numpy(), s=size).conj()
    return torch.from_numpy(np.fft.irfft2(spectrum, s=size)[:, :places, :places])


def _details(image: Tensor) -> Tensor:
    """Without the low frequencies."""
    padded = functional.pad(image[None, None], [_BLUR // 2] * 4, mode="replicate")
    return image - functional.avg_pool2d(padded, _BLUR, stride=1)[0, 0]
