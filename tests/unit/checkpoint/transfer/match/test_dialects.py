"""The table of known dialects: its evidence, its rules, and that it only renames."""

from __future__ import annotations

import re

from benchmarks.transfer_cases import HF_BLOCK, renamed, split_qkv, trained, vit, without
from dtl.checkpoint import plan_transfer
from dtl.checkpoint.transfer.match.dialects import translations


def hub_names() -> list[str]:
    return list(renamed(split_qkv(vit().state_dict()), *HF_BLOCK))


def test_a_dialect_is_picked_by_its_evidence_alone() -> None:
    found = list(translations(hub_names(), list(vit().state_dict())))
    assert [each.dialect for each in found] == ["transformers' ViT, DeiT and DINOv2"]
    assert found[0].names["vit.encoder.layer.1.layernorm_after.bias"] == "blocks.1.norm2.bias"
    assert found[0].names["vit.encoder.layer.2.attention.attention.key.weight"] == "blocks.2.attn.k.weight"
    assert list(translations(list(vit().state_dict()), list(vit().state_dict()))) == []
    assert list(translations([name for name in hub_names() if "query" not in name], [])) == []


def test_numbers_are_counted_on_and_what_is_not_meant_is_set_aside() -> None:
    swin = [
        "swin.embeddings.patch_embeddings.projection.weight",
        "swin.encoder.layers.0.blocks.1.attention.self.query.weight",
        "swin.encoder.layers.0.downsample.reduction.weight",
    ]
    (found,) = translations(swin, [])
    assert found.names[swin[2]] == "layers.1.downsample.reduction.weight"
    clip = ["conv1.weight", "class_embedding", "transformer.resblocks.0.attn.in_proj_weight"]
    (found,) = translations([*(f"visual.{name}" for name in clip), *clip[2:], "token_embedding.weight"], [])
    assert found.names == {f"visual.{a}": b for a, b in zip(clip, ["patch_embed.proj.weight", "cls_token", "blocks.0.attn.qkv.weight"])}


def test_a_dialect_is_read_backwards_for_a_network_of_its_library() -> None:
    """timm's weights, into a network with the names of transformers; the benchmark transfer_hub loads the real ones and compares their outputs."""
    hub = renamed(split_qkv(vit().state_dict()), *HF_BLOCK)
    plan = plan_transfer(dict(sorted(vit().state_dict().items())), hub)
    assert plan.ok
    assert plan.notes[-1] == "the names are those of timm and of transformers' ViT, DeiT and DINOv2"
    words = dict(zip(hub, (re.sub(r"\.(query|key|value)\.", ".qkv.", name) for name in split_qkv(vit().state_dict()))))
    assert plan.pairs == words
    assert plan.pairs["vit.encoder.layer.2.attention.attention.value.bias"] == "blocks.2.attn.qkv.bias"
    assert {o.transform for o in plan.outcomes if o.target and "attention.attention.key" in o.target} == {"split_1_of_3"}


def test_a_dialect_loads_nothing_that_a_plan_would_not() -> None:
    """The names are known, but a layer is missing: refused like any other, in the file's own names."""
    source = without(renamed(split_qkv(trained(vit()).state_dict()), *HF_BLOCK), r"layer\.1\.intermediate")
    plan = plan_transfer(dict(sorted(source.items())), vit())
    assert plan.refusals[0].endswith("set fresh: ['blocks.1.mlp.fc1.*']")
    assert plan_transfer(dict(sorted(source.items())), vit(), fresh=["blocks.1.mlp.fc1.*"]).ok
    whole = plan_transfer(dict(sorted(renamed(split_qkv(vit().state_dict()), *HF_BLOCK).items())), vit())
    assert whole.ok
    assert whole.pairs["blocks.0.norm1.weight"] == "vit.encoder.layer.0.layernorm_before.weight"
    assert whole.pairs["blocks.0.attn.qkv.bias"] == tuple(f"vit.encoder.layer.0.attention.attention.{part}.bias" for part in ("query", "key", "value"))
    assert whole.notes[-1] == "the names are those of transformers' ViT, DeiT and DINOv2"
