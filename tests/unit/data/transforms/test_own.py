"""A function of the user's own changes training images, the same way on any rank, in any loader process and after any restart."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dtl.config.models import AugmentConfig, DataConfig
from dtl.data.loading.loader import StepLoader
from dtl.data.open import ensure_packed
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.own import OwnFunction
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def test_a_call_is_a_function_of_its_key_and_leaves_no_trace() -> None:
    own = OwnFunction("own_functions:noisy")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    kept = IMAGE.copy()
    first, other, again = own(IMAGE, 5, "a"), own(IMAGE, 6, "a"), pickle.loads(pickle.dumps(own))(IMAGE, 5, "a")
    assert first.shape == (11, 7, 3)
    assert first.flags.c_contiguous
    np.testing.assert_array_equal(first, again)
    for of_one_generator in (np.s_[0], np.s_[:, 0], np.s_[-2:]):
        assert (first[of_one_generator] != other[of_one_generator]).any()
    np.testing.assert_array_equal(IMAGE, kept)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", r"gave float32 \[3, 9, 7\] for cat/1.jpg; it takes and gives a tensor uint8 \[3, H, W\]"),
        ("gray", r"gave uint8 \[1, 9, 7\] for cat/1.jpg"),
        ("array", "gave a ndarray for cat/1.jpg"),
        ("fails", r"failed on cat/1.jpg: ValueError: no such image \(.*own_functions.py:\d+\)"),
        ("nosy", "own_functions has no function 'nosy'; did you mean 'noisy'?"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(name: str, message: str) -> None:
    before = random.getstate()
    with pytest.raises(UserError, match=f"data.augment.function own_functions:{name}.*{message}") as raised:
        OwnFunction(f"own_functions:{name}")(IMAGE, 5, "cat/1.jpg")
    assert "\n" not in str(raised.value)
    assert random.getstate() == before


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = ensure_packed("digits", DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))), split="val", progress=False, log=lambda line: None)
    return Shards.open(folder)


def images(shards: Shards, name: str, *, rank: int = 0, world: int = 1, workers: int = 0, first: int = 0, views: tuple[int, ...] = ()) -> dict[int, bytes]:
    """slot -> pixels, of the steps from `first` to the fourth; with views, of all of them."""

    def plan(epoch: int) -> EpochPlan:
        return EpochPlan(shards.shard_sizes, seed=7, epoch=epoch, global_batch_size=20)

    transform = train_transform(image_size=12, augment=AugmentConfig(preset="imagenet", function=f"own_functions:{name}", turns=True))
    layout = RankLayout.for_plan(plan(0), num_ranks=world, micro_batch_size=None)
    loader = StepLoader(shards, transform, plans=plan, layout=layout, rank=rank, image_size=12, seed=7, workers=workers, views=views)
    found = {}
    for step, batches in enumerate(loader.steps(0, first, 4 - first), start=first):
        for batch in batches:
            size = len(batch.slots)
            for i, slot in enumerate(batch.slots.tolist()):
                if slot >= 0:
                    found[20 * step + slot] = batch.images[i::size].contiguous().numpy().tobytes()
    return found


def test_ranks_workers_and_restarts_do_not_change_a_pixel(shards: Shards) -> None:
    for name in ("noisy", "posterized"):
        expected = images(shards, name)
        assert len(expected) == 80
        assert images(shards, name, rank=0, world=2, workers=2) | images(shards, name, rank=1, world=2) == expected
        later = images(shards, name, first=2, workers=1)
        assert later == {slot: pixels for slot, pixels in expected.items() if slot >= 40}
    assert images(shards, "noisy") != images(shards, "posterized")


def test_each_view_has_the_pixels_of_its_epoch(shards: Shards) -> None:
    one, two = images(shards, "noisy", views=(0,)), images(shards, "noisy", views=(0, 3))
    assert one == images(shards, "noisy")
    assert all(both[: len(first)] == first != both[len(first) :] for first, both in zip(one.values(), two.values()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_in_a_loader_process_is_the_same_line(shards: Shards, workers: int) -> None:
    with pytest.raises(UserError, match=r"^data.augment.function own_functions:fails failed on digits/\d+: ValueError: no such image \(\S+:\d+\)$"):
        images(shards, "fails", workers=workers)


def test_only_training_calls_it(tmp_path: Path) -> None:
    assert eval_transform(image_size=12).function is None
    assert not train_transform(image_size=12, augment=AugmentConfig(preset="none", horizontal_flip=False, function="a:b")).is_fixed
    named = train_transform(image_size=12, augment=AugmentConfig(function="own_functions:noisy")).describe()["augment"]["function"]
    assert named[0] == "own_functions:noisy"
    assert len(named[1]) == 64, "features that other code gave are not used"
    assert "function" not in train_transform(image_size=12, augment=AugmentConfig()).describe()["augment"], "caches from before stay"
