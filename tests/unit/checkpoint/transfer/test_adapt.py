"""Adapters: the function computed stays the same wherever it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transfer_networks import Tokens, Window

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer import adapt
from dtl.checkpoint.transfer.layers import layer
from dtl.checkpoint.transfer.source.class_names import pick_rows
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


def test_attention_biases_are_resized_as_timm_does() -> None:
    from timm.layers import resize_rel_pos_bias_table_levit

    table = torch.randn(3, 14 * 14)
    expected = resize_rel_pos_bias_table_levit(table.T, (28 * 28, 3)).T
    assert layer.distances_transform((3, 196), (3, 784), None) == layer.distances_transform((3, 196), (3, 784), (28, 28)) == "resize_attention_biases_28x28"
    torch.testing.assert_close(adapt.apply_transform("resize_attention_biases_28x28", [table], (3, 784)), expected, rtol=0, atol=1e-6)
    oblong = adapt.apply_transform("resize_attention_biases_14x28", [table.new_ones(3, 196)], (3, 392))
    torch.testing.assert_close(oblong, torch.ones(3, 392))
    assert adapt.why_not("resize_attention_biases_14x28", [(3, 196)], (3, 400)) == "resizes [heads, N] attention biases of square grids to 14 x 28 places"


def test_embeddings_of_distances_along_an_axis_are_resized_as_sam_does() -> None:
    from timm.models.vision_transformer_sam import get_rel_pos

    table = torch.randn(27, 6)
    distances = torch.arange(28)[:, None] - torch.arange(28)[None, :] + 27
    ours = adapt.apply_transform("resize_relative_axis", [table], (55, 6))
    torch.testing.assert_close(ours[distances], get_rel_pos(28, 28, table), rtol=0, atol=1e-6)


def test_position_embeddings_with_the_channels_last() -> None:
    table = torch.randn(1, 14, 14, 6)
    resized = adapt.resize_position_embedding(table, (1, 28, 21, 6))
    expected = adapt.resize_position_embedding(table.permute(0, 3, 1, 2), (1, 6, 28, 21)).permute(0, 2, 3, 1)
    torch.testing.assert_close(resized, expected, rtol=0, atol=0)
    torch.testing.assert_close(adapt.resize_position_embedding(table, (1, 14, 28, 6))[:, :, ::2].mean(), table.mean(), rtol=0, atol=0.2)


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
    assert all(torch.equal(adapt.apply_transform(f"split_{n}_of_3", [fused], (4, 4)), part) for n, part in enumerate(parts))
    assert torch.equal(adapt.apply_transform("split_1_to_2_of_3", [fused], (8, 4)), torch.cat(parts[1:]))


def test_kernels_of_other_frameworks() -> None:
    weight = torch.randn(5, 3, 2, 4)
    assert torch.equal(adapt.transpose_kernel(weight.permute(2, 3, 1, 0), (5, 3, 2, 4)), weight)
    gray = adapt.transpose_stem(weight.permute(2, 3, 1, 0), (5, 1, 2, 4))
    torch.testing.assert_close(gray, weight.sum(1, keepdim=True))


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


def small_vit(**options: object) -> nn.Module:
    """timm's own ViT, which has all kinds of position tables, with random values everywhere: 16 tokens of a class and a square of 64 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    given = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3, **options}
    network = VisionTransformer(**given)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    return network.eval()


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (96, 64), (32, 112)])
@pytest.mark.parametrize("options", [{}, {"no_embed_class": True}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}])
def test_positions_are_resized_as_timm_does_it(size: tuple[int, int], options: dict[str, object]) -> None:
    """Into the same network at another size, oblong too, whatever stands in front of the grid: class token, registers, or nothing."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    source, target, reference = small_vit(**options), small_vit(img_size=size, **options), small_vit(img_size=size, **options)
    reference.load_state_dict(checkpoint_filter_fn(source.state_dict(), reference))  # type: ignore[arg-type]
    report = load_pretrained(target, source.state_dict())
    assert report.fresh == ()
    torch.testing.assert_close(target.pos_embed, reference.pos_embed, rtol=0, atol=1e-6)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(target(images), reference(images))


def test_the_class_tokens_position_is_added_to_the_token_where_the_table_has_no_row_for_it() -> None:
    """As timm does it with DINOv2's files that hold registers. Without registers the network computes the same."""
    source = small_vit()
    plain, registers = small_vit(no_embed_class=True), small_vit(no_embed_class=True, reg_tokens=4, img_size=(96, 64))
    report = load_pretrained(plain, source.state_dict())
    assert {o.target: o.transform for o in report.outcomes if o.transform} == {"cls_token": "add_position", "pos_embed": "resize_position_embedding"}
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), source(images))

    report = load_pretrained(registers, source.state_dict(), fresh=["reg_token"])
    assert report.fresh == ("reg_token",), "there is nothing to load them from, and the report says so"
    assert torch.equal(registers.cls_token, source.cls_token + source.pos_embed[:, :1])
    torch.testing.assert_close(registers.pos_embed, adapt.resize_positions_to(source.pos_embed[:, 1:], (1, 24, 24), (6, 4)))


@pytest.mark.parametrize(("size", "rows"), [((64, 64), 49), ((96, 96), 121), ((96, 64), 77)])
def test_beits_relative_tables_keep_the_rows_of_the_class_token(size: tuple[int, int], rows: int) -> None:
    from timm.models.beit import Beit

    given = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    source, target = Beit(img_size=64, **given), Beit(img_size=size, **given)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0, 0.3)
        source.blocks[0].attn.relative_position_bias_table[:-3] = 0.25
    report = load_pretrained(target, source.state_dict())
    assert report.fresh == ()
    table, before = (network.blocks[0].attn.relative_position_bias_table for network in (target, source))
    assert torch.equal(table[-3:], before[-3:])
    torch.testing.assert_close(table[:-3], torch.full((rows, 2), 0.25))


def test_tables_of_heads_by_height_and_width() -> None:
    turned = torch.arange(2 * 13 * 13.0).reshape(2, 13, 13)
    wide = adapt.apply_transform("resize_relative_table", [turned], (2, 19, 15))
    torch.testing.assert_close(adapt.apply_transform("resize_relative_table", [turned.permute(1, 2, 0)], (19, 15, 2)), wide.permute(1, 2, 0))
    torch.testing.assert_close(adapt.apply_transform("resize_relative_table", [torch.full((2, 13, 13), 0.5)], (2, 19, 15)), torch.full((2, 19, 15), 0.5))


@pytest.mark.parametrize(
    ("transform", "have", "want", "why"),
    [
        ("resize_position_embedding_6x4", [(1, 17, 24)], (1, 25, 24), None),
        ("resize_position_embedding_6x4", [(1, 17, 24)], (1, 24, 24), None),
        ("resize_position_embedding_6x4", [(1, 16, 24)], (1, 25, 24), "resizes [1, N, D] position embeddings of square grids to 6 x 4 places"),
        ("resize_relative_table_11x7", [(52, 2)], (80, 2), None),
        ("resize_relative_table_11x7", [(53, 2)], (80, 2), "resizes [(2s-1)^2 + extra, heads] tables of square grids to 11 x 7 places"),
        ("add_position", [(1, 1, 24), (1, 17, 24)], (1, 1, 24), None),
        ("add_position", [(1, 1, 24)], (1, 1, 24), "takes a class token [1, 1, D] and its position embedding [1, N, D]"),
    ],
)
def test_tables_that_a_map_asks_for_are_checked(transform: str, have: list[tuple[int, ...]], want: tuple[int, ...], why: str | None) -> None:
    assert adapt.is_transform(transform)
    assert adapt.why_not(transform, have, want) == why
