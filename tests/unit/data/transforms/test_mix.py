"""dtl.data.transforms.mix: pairs of the global batch, the same however it is cut; lambda by key; shares that add up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dtl.data.transforms.mix import draw_pairs, mix_batch, symmetric_beta

KEYS = {"seed": 3, "epoch": 1, "step": 17}


def _batch(num_slots: int, *, size: int = 12, num_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_slots, 3, size, size + 3, generator=generator)
    labels = torch.randint(0, num_classes, (num_slots,), generator=generator)
    return images, torch.nn.functional.one_hot(labels, num_classes).float()


SETTINGS = [{"mixup": 0.2, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("num_slots", "cuts"), [(24, [2]), (24, [8, 14]), (25, [2, 4, 6, 20]), (7, [6]), (1, []), (2, [])])
def test_any_cut_at_even_slots_gives_the_same(settings: dict[str, float], num_slots: int, cuts: list[int]) -> None:
    images, targets = _batch(num_slots)
    whole = mix_batch(images, targets, torch.arange(num_slots), **settings, **KEYS)
    edges = [0, *cuts, num_slots]
    for begin, end in itertools.pairwise(edges):
        # A pad at the end, as the loader puts it there.
        rows = [*range(begin, end), begin]
        slots = torch.tensor([*range(begin, end), -1])
        weights = torch.tensor([1.0] * (end - begin) + [0.0])
        part = mix_batch(images[rows], targets[rows], slots, weights=weights, **settings, **KEYS)
        assert torch.equal(part[0][:-1], whole[0][begin:end])
        assert torch.equal(part[1][:-1], whole[1][begin:end])
        assert torch.equal(part[0][-1], images[begin])
        assert torch.equal(part[1][-1], targets[begin])


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_image_is_used_once(settings: dict[str, float]) -> None:
    images, targets = _batch(40)
    mixed, shares = mix_batch(images, targets, np.arange(40), **settings, **KEYS)
    torch.testing.assert_close(mixed[0::2] + mixed[1::2], images[0::2] + images[1::2])
    torch.testing.assert_close(shares[0::2] + shares[1::2], targets[0::2] + targets[1::2])
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(40))
    assert (mixed != images).any()


def test_mixup_is_the_formula() -> None:
    images, targets = _batch(40)
    mixed, shares = mix_batch(images, targets, np.arange(40), mixup=0.5, cutmix=0.0, **KEYS)
    share = torch.from_numpy(symmetric_beta(0.5, np.arange(20), 3, 1, 17, "mixup")).float()
    for pair in range(20):
        a, b, lam = images[2 * pair], images[2 * pair + 1], share[pair]
        torch.testing.assert_close(mixed[2 * pair], lam * a + (1 - lam) * b)
        torch.testing.assert_close(shares[2 * pair], lam * targets[2 * pair] + (1 - lam) * targets[2 * pair + 1])


def test_cutmix_follows_the_real_area_of_its_box() -> None:
    ones = torch.ones(200, 3, 16, 20)
    ones[1::2] = 0
    targets = torch.zeros(200, 2)
    targets[0::2, 0], targets[1::2, 1] = 1, 1
    mixed, shares = mix_batch(ones, targets, np.arange(200), mixup=0.0, cutmix=1.0, **KEYS)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mixed[0::2].mean(dim=(1, 2, 3)), shares[0::2, 0])
    torch.testing.assert_close(mixed[1::2].mean(dim=(1, 2, 3)), shares[1::2, 0])
    for image in 1 - mixed[0::2, 0]:
        rows, columns = image.any(dim=1), image.any(dim=0)
        assert torch.equal(image.bool(), rows[:, None] & columns[None, :]), "one rectangle"
    assert shares[0::2, 0].std() > 0.15


def test_with_both_a_coin_chooses_for_each_pair() -> None:
    share, boxes = draw_pairs(np.arange(4000), 32, 32, mixup=1.0, cutmix=1.0, names=(0, 0, 0))
    cut = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) > 0
    assert not (cut & (share != 1)).any()
    assert abs((share != 1).mean() - 0.5) < 0.03
    assert (boxes >= 0).all()
    assert (boxes <= 32).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_pair_with_a_damaged_sample_stays(settings: dict[str, float]) -> None:
    images, targets = _batch(12)
    weights = torch.ones(12)
    weights[[3, 8]] = 0
    mixed, shares = mix_batch(images, targets, np.arange(12), weights=weights, **settings, **KEYS)
    full, full_shares = mix_batch(images, targets, np.arange(12), **settings, **KEYS)
    for pair in range(6):
        rows = slice(2 * pair, 2 * pair + 2)
        expected = (images, targets) if pair in (1, 4) else (full, full_shares)
        assert torch.equal(mixed[rows], expected[0][rows])
        assert torch.equal(shares[rows], expected[1][rows])


def test_keys_change_the_draw_and_off_is_untouched() -> None:
    images, targets = _batch(12)
    seen = set()
    for key, value in [("seed", 9), ("epoch", 9), ("step", 9), ("seed", 3)]:
        mixed, _ = mix_batch(images, targets, np.arange(12), mixup=1.0, cutmix=0.0, **{**KEYS, key: value})
        seen.add(mixed.numpy().tobytes())
    assert len(seen) == 4
    off, same = mix_batch(images, targets, np.arange(12), mixup=0.0, cutmix=0.0, **KEYS)
    assert off is images
    assert same is targets


def test_memory_format_and_type_stay() -> None:
    images, targets = _batch(12)
    for dtype in (torch.float32, torch.bfloat16):
        given = images.to(dtype).contiguous(memory_format=torch.channels_last)
        mixed, shares = mix_batch(given, targets, np.arange(12), mixup=1.0, cutmix=1.0, **KEYS)
        assert mixed.dtype == dtype
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert shares.dtype == torch.float32


@pytest.mark.parametrize("slots", [[1, 2, 3], [0, 2, 3, 5], [0, 1, 2, 4], [0, 2], [1, 0]])
def test_a_parted_pair_is_our_mistake(slots: list[int]) -> None:
    images, targets = _batch(len(slots))
    with pytest.raises(AssertionError, match="separate a pair"):
        mix_batch(images, targets, np.array(slots), mixup=1.0, cutmix=0.0, **KEYS)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 2.0, 8.0])
def test_lambda_follows_beta(alpha: float) -> None:
    ours = np.sort(symmetric_beta(alpha, np.arange(50_000), 5, "test"))
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 50_000))
    assert abs(ours - theirs).max() < 0.03
    assert abs(ours.mean() - 0.5) < 0.01
    assert ours.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1e3])
def test_lambda_is_a_share_for_any_alpha(alpha: float) -> None:
    share = symmetric_beta(alpha, np.arange(10_000), 5)
    assert np.isfinite(share).all()
    assert (share >= 0).all()
    assert (share <= 1).all()
    assert abs(share.mean() - 0.5) < 0.02
