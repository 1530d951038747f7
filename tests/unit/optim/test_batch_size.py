"""A global batch that leaves GPUs idle gets a line with a larger one that fits, and what that does to the learning rate."""

from __future__ import annotations

import pytest

from dtl.optim.batch_size import GIB, advise_batch


def test_eight_images_a_gpu_of_the_default_batch_on_eight_gpus() -> None:
    assert advise_batch(8, 8, used=2 * GIB, total=80 * GIB) == (
        "8 images per GPU (2.0 of 80 GiB): a global batch of 512 would fill these 8 GPUs; "
        "--data.global-batch-size 512, and lr times 8 with sgd, times 2.8 with adam and adamw"
    )


@pytest.mark.parametrize(
    ("images", "world", "used", "most", "said"),
    [
        (64, 1, 10.0, None, ""),  # enough
        (40, 1, 10.0, None, ""),  # twice as many would be more than enough
        (8, 1, 20.0, None, "a global batch of 16 would fill this GPU"),  # four times as much is no room
        (8, 1, 70.0, None, ""),
        (8, 8, 1.0, 200, "a global batch of 128 would"),  # an epoch needs some steps
    ],
)
def test_only_what_fits_is_advised(images: int, world: int, used: float, most: int | None, said: str) -> None:
    line = advise_batch(images, world, used=int(used * GIB), total=80 * GIB, most=most)
    assert said in line if said else not line


def test_without_a_gpus_memory_nothing_is_said() -> None:
    assert advise_batch(1, 8, used=0, total=0) == ""
