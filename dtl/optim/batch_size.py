"""Whether a global batch leaves GPUs without enough work, and how the learning rate follows a larger one. No torch in here."""

from __future__ import annotations

import math

from dtl.text import counted

GIB = 2**30
# At 224 pixels the networks that people fine-tune come close to a GPU's full speed with this many images; smaller ones need more, and never fewer.
ENOUGH, FULL = 64, 0.8


def advise_batch(images: int, world: int, *, used: int, total: int, most: int | None = None) -> str:
    """A line where each of `world` GPUs has fewer `images` at once than keep it busy, and memory for more; empty otherwise.

    `used`: bytes of the `total` memory of a GPU that its process had at most. `most`: the largest global batch that makes sense for the data.
    The new global batch is the present one times a power of two.
    """
    factor = 1
    while 2 * factor * images <= ENOUGH and 2 * factor * used <= FULL * total and (most is None or 2 * factor * images * world <= most):
        factor *= 2
    if factor == 1 or not total:
        return ""
    here, larger = "this GPU" if world == 1 else f"these {world} GPUs", factor * images * world
    return (
        f"{counted(images, 'image')} per GPU ({used / GIB:.1f} of {total / GIB:.0f} GiB): a global batch of {larger} would fill {here}; "
        f"--data.global-batch-size {larger}, and lr times {factor} with sgd, times {math.sqrt(factor):.1f} with adam and adamw"
    )
