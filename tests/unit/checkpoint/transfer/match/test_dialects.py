"""The table of known dialects: its evidence, its rules, and that it only renames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.transfer_cases import CASES, HF_BLOCK, Case, renamed, split_qkv, trained, vit, without
from dtl.checkpoint import load_pretrained, plan_transfer, read_weights
from dtl.checkpoint.transfer.match import dialects
from dtl.checkpoint.transfer.match.dialects import translations
from dtl.errors import TransferRefused, UserError


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


def holder(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module with these parameters, all zero, and no function."""
    top = nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        module = top
        for word in path:
            if word not in dict(module.named_children()):
                module.add_module(word, nn.Module())
            module = module.get_submodule(word)
        module.register_parameter(last, nn.Parameter(torch.zeros_like(value)))
    return top


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("transformers' ") and "torchvision" not in case.name], ids=lambda case: case.name
)
def test_what_came_from_a_library_goes_back_into_it(case: Case, tmp_path: Path) -> None:
    """There and back gives each tensor its values again; those of a mask token, which timm does not have, aside."""
    trial = case.build(tmp_path)
    hub, table = read_weights(trial.source).tensors, "embeddings.position_embeddings"
    registers = "embeddings.register_tokens" in hub
    if registers:  # where timm's class token has no position, transformers' table has a row for it
        hub[table] = torch.cat([torch.randn(1, 1, 32), hub[table]], dim=1)
    there = load_pretrained(trial.target, hub, keep_head=True)
    in_order = [name for o in there.outcomes for name in o.sources]  # files are sorted, modules are not
    back = holder({name: hub[name] for name in in_order})
    load_pretrained(back, trial.target.state_dict(), keep_head=True, fresh=[name for name in hub if "mask_token" in name])
    found = back.state_dict()
    for tensors in (hub, found) if registers else ():
        tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"] + tensors[table][:, :1]
        tensors[table] = tensors[table][:, 1:]
    for name, value in hub.items():
        if "mask_token" not in name:
            torch.testing.assert_close(found[name], value, msg=name)


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


def test_what_a_refusal_offers_has_the_names_of_the_file(tmp_path: Path) -> None:
    """A network that registers its modules in alphabetical order, against which the weights' own order speaks."""
    trial = next(case for case in CASES if case.name == "transformers' SigLIP with its pooling head").build(tmp_path)
    source = trial.target.state_dict()
    plan = plan_transfer(source, holder(read_weights(trial.source).tensors))
    assert plan.notes[-1].startswith("the names are those of timm and of")
    offered = {name for names in plan.flagged.values() for name in names}
    assert offered
    assert offered <= set(source)
    assert "could be blocks." in plan.refusals[0]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the table, to add to."""
    copy = tmp_path / "dialects.yaml"
    copy.write_bytes(dialects.TABLE.read_bytes())
    monkeypatch.setattr(dialects, "TABLE", copy)
    dialects._table.cache_clear()
    yield copy
    dialects._table.cache_clear()


PAGE = Path(__file__).parents[5] / "docs" / "weight-transfer.md"
MINE = (
    (r"^patch_embed\.proj", "stem"),
    (r"^cls_token", "token"),
    (r"^pos_embed", "positions"),
    (r"^blocks\.(\d+)\.norm1", r"encoder.block\1.pre_norm"),
    (r"^blocks\.(\d+)\.norm2", r"encoder.block\1.post_norm"),
    (r"^blocks\.(\d+)\.attn\.([qkv])\.", r"encoder.block\1.attention.w\2."),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.block\1.attention.wo"),
    (r"^blocks\.(\d+)\.mlp\.fc1", r"encoder.block\1.mlp.up"),
    (r"^blocks\.(\d+)\.mlp\.fc2", r"encoder.block\1.mlp.down"),
    (r"^norm\.", "encoder.norm."),
)


def test_the_example_of_the_page_is_all_that_a_new_dialect_needs(table: Path) -> None:
    (example,) = re.findall(r"```yaml\ndialects:\n(.*?)```", PAGE.read_text(), re.DOTALL)
    source, target = trained(vit()), vit()
    state = renamed(split_qkv(source.state_dict(), ("q", "k", "v")), *MINE) | {"decoder.weight": torch.randn(8, 8)}
    file = dict(sorted(state.items()))
    with pytest.raises(TransferRefused):
        load_pretrained(target, file)
    table.write_text(table.read_text().replace("\ntargets:\n", f"\n{example}targets:\n"))
    dialects._table.cache_clear()
    report = load_pretrained(target, file)
    assert report.plan.notes[-1] == "the names are those of my library's ViT"
    assert report.coverage == 1
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(target(images), source(images))


@pytest.mark.parametrize(
    ("entry", "message"), [("rules: [['a', '\\1']]", "x: invalid group reference"), ("rules: [['(', '']]", "x: missing"), ("rules: []", "x: no 'when'")]
)
def test_a_wrong_entry_of_the_table_is_named(table: Path, entry: str, message: str) -> None:
    table.write_text(f"dialects:\n  - name: x\n    {entry}\ntargets: []\n".replace("]]\n", "]]\n    when: ['^x$']\n"))
    with pytest.raises(UserError, match=message):
        list(translations(["x"], ["x"]))
