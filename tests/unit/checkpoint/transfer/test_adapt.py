"""Adapters: the function computed stays the same wherever it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transfer_networks import Tokens, Window

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer import adapt
from dtl.checkpoint.transfer.outcomes import pick_rows
from dtl.errors import UserError


def test_one_channel_is_the_sum_so_that_gray_images_give_what_they_gave() -> None:
    weight = torch.randn(8, 3, 7, 7)
    gray = torch.randn(2, 1, 32, 32)
    before = F.conv2d(gray.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(F.conv2d(gray, adapt.stem_channels(weight, (8, 1, 7, 7))), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 4, 6, 9])
def test_more_channels_repeat_and_keep_the_size_of_the_response(channels: int) -> None:
    weight = torch.randn(8, 3, 3, 3)
    wide = adapt.stem_channels(weight, (8, channels, 3, 3))
    assert wide.shape == (8, channels, 3, 3)
    torch.testing.assert_close(wide[:, 0], weight[:, 0] * 3 / channels)
    if channels % 3 == 0:
        torch.testing.assert_close(wide.sum(1), weight.sum(1))


def test_linear_as_convolution_and_back() -> None:
    weight, x = torch.randn(5, 7), torch.randn(2, 7)
    kernel = adapt.squeeze(weight, (5, 7, 1, 1))
    torch.testing.assert_close(F.conv2d(x[:, :, None, None], kernel).flatten(1), F.linear(x, weight))
    wide = torch.randn(5, 3 * 4 * 4)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(F.conv2d(images, adapt.reshape_kernel(wide, (5, 3, 4, 4))).flatten(1), F.linear(images.flatten(1), wide))


def test_position_embeddings_keep_class_tokens_and_constants() -> None:
    table = torch.cat([torch.full((1, 1, 6), 9.0), torch.full((1, 49, 6), 2.0)], dim=1)
    resized = adapt.resize_position_embedding(table, (1, 145, 6))
    assert resized.shape == (1, 145, 6)
    torch.testing.assert_close(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 144, 6), 2.0))
    same = torch.randn(1, 50, 6)
    torch.testing.assert_close(adapt.resize_position_embedding(same, (1, 50, 6)), same, rtol=1e-4, atol=1e-5)
    without = adapt.resize_position_embedding(table, (1, 49, 6))
    torch.testing.assert_close(without, table[:, 1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="lacks 1 class token"):
        adapt.resize_position_embedding(without, (1, 50, 6))
    assert adapt.resize_position_embedding(torch.randn(1, 6, 7, 7), (1, 6, 12, 12)).shape == (1, 6, 12, 12)


def test_relative_tables() -> None:
    table = torch.full((13 * 13, 3), 0.5)
    torch.testing.assert_close(adapt.resize_relative_table(table, (23 * 23, 3)), torch.full((23 * 23, 3), 0.5))


def test_patches_of_another_size_see_what_they_saw() -> None:
    weight = torch.randn(6, 3, 16, 16)
    smaller = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    larger = F.interpolate(smaller, size=(16, 16), mode="bicubic", antialias=True)
    grown = adapt.resize_patches(torch.randn(6, 3, 8, 8), (6, 3, 16, 16))
    assert grown.shape == (6, 3, 16, 16)
    original = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    # Embedding the enlarged patch with the enlarged kernel gives what the patch gave with its own.
    torch.testing.assert_close(F.conv2d(larger, adapt.resize_patches(original, (6, 3, 16, 16))), F.conv2d(smaller, original), rtol=1e-6, atol=1e-6)
    assert adapt.resize_patches(weight, (6, 3, 32, 32)).dtype == weight.dtype


def test_fuse_and_split_are_inverse() -> None:
    parts = [torch.randn(4, 4) for _ in range(3)]
    fused = adapt.fuse(parts)
    assert all(torch.equal(adapt.split(fused, n, 3), part) for n, part in enumerate(parts))


def test_kernels_of_other_frameworks() -> None:
    weight = torch.randn(5, 3, 2, 4)
    assert torch.equal(adapt.transpose_kernel(weight.permute(2, 3, 1, 0), (5, 3, 2, 4)), weight)


def test_rows_by_class_names() -> None:
    head = torch.arange(8.0).reshape(4, 2)
    picks = pick_rows(["ant", "bee", "cat", "dog"], ["dog", "insect"], {"insect": ["ant", "bee"]})
    assert picks == ((3,), (0, 1))
    torch.testing.assert_close(adapt.rows(head, picks), torch.tensor([[6.0, 7.0], [1.0, 2.0]]))
    with pytest.raises(UserError, match="the source has no class 'cow'"):
        pick_rows(["ant"], ["ant", "cow"])
    with pytest.raises(UserError, match="this network has no class 'cow'"):
        pick_rows(["ant"], ["ant"], {"cow": "ant"})
    with pytest.raises(UserError, match=r"^head_rows: the list of class 'ant' is empty$"):
        pick_rows(["ant"], ["ant"], {"ant": ()})


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_norm_is_the_same_function(bias: bool) -> None:
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    weight, shift = adapt.fold_norm(conv.weight, conv.bias, norm.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(F.conv2d(x, weight, shift), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_unknown_transforms_are_named() -> None:
    assert adapt.is_transform("split_1_of_3")
    assert not adapt.is_transform("magic")
    with pytest.raises(UserError, match=r"unknown transform 'magic'; known transforms are .*stem_channels"):
        adapt.apply_transform("magic", [torch.zeros(1)], (1,))


@pytest.mark.parametrize("by", ["auto", "name"])
def test_a_transfer_resizes_positions_for_another_image_size(by: str) -> None:
    source, target = Tokens(32), Tokens(64)
    report = load_pretrained(target, source.state_dict(), by=by)  # type: ignore[arg-type]
    assert {o.target: o.transform for o in report.outcomes if o.transform} == {"pos_embed": "resize_position_embedding"}
    assert report.fresh == ()
    torch.testing.assert_close(target.pos_embed, adapt.resize_position_embedding(source.pos_embed, (1, 65, 12)))


def test_a_transfer_resizes_relative_tables() -> None:
    source, target = Window(7), Window(12)
    report = load_pretrained(target, source.state_dict())
    assert [o.transform for o in report.outcomes if o.transform] == ["resize_relative_table"]
    torch.testing.assert_close(target.relative_position_bias_table, adapt.resize_relative_table(source.relative_position_bias_table, (529, 2)))
