"""`model.pool`: what the head of a vision transformer sees, by formula, through model folders, transfers and cached features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import model_folder

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.resume.model_folder import load_network
from dtl.config import load_config
from dtl.errors import UserError
from dtl.models.build import build, options_of
from dtl.models.freeze import freeze, select
from dtl.models.groups import layer_groups
from dtl.models.meta import meta_copy
from dtl.training.features import find_cut

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
# A class token; one with registers; a norm behind the pooling; another family, which has it in front; no class token and attention in place of pooling.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("timm/vit_tiny_patch16_224", SMALL),
    "registers": ("timm/vit_small_patch14_reg4_dinov2", SMALL),
    "fc_norm": ("timm/vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
    "eva": ("timm/vit_small_patch16_dinov3", SMALL),
    "beit": ("timm/beit_base_patch16_224", SMALL),
    "map": ("timm/vit_base_patch16_siglip_224", SMALL),
}


@pytest.mark.parametrize("pool", ["token", "avg", "token+avg"])
@pytest.mark.parametrize("kind", ["token", "registers", "fc_norm", "eva", "beit"])
def test_the_head_sees_what_is_asked_for(kind: str, pool: str) -> None:
    name, options = NETWORKS[kind]
    network = build(name, num_classes=5, options={**options, "pool": pool})
    plain = build(name, num_classes=5, options=options).module.eval()
    module = network.module.eval()
    own = {key: value for key, value in module.state_dict().items() if not key.startswith("head.")}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = plain.forward_features(images)
        parts = {"token": tokens[:, 0], "avg": tokens[:, plain.num_prefix_tokens :].mean(dim=1)}
        if kind != "eva":
            parts = {key: plain.fc_norm(part) for key, part in parts.items()}
        expected = module.head(torch.cat([parts[one] for one in pool.split("+")], dim=1))
        torch.testing.assert_close(module(images), expected, rtol=0, atol=0)
    assert network.heads == ("head",)
    assert network.module.head.in_features == 24 * (1 + ("+" in pool))


def test_without_a_class_token_there_is_the_mean() -> None:
    name, options = NETWORKS["map"]
    network = build(name, num_classes=5, options={**options, "pool": "avg"})
    module, images = network.module.eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(module(images), module.head(module.forward_features(images).mean(dim=1)), rtol=0, atol=0)
    assert not [key for key in module.state_dict() if "attn_pool" in key]


def test_all_that_is_done_with_a_network_is_done_with_it(tmp_path: Path) -> None:
    name, options = "timm/vit_tiny_patch16_224", {**SMALL, "pool": "token+avg"}
    network, source = build(name, num_classes=3, options=options), build(name, num_classes=7, options=SMALL)
    report = load_pretrained(network.module, source.module.state_dict())
    assert report.fresh == ("head.weight", "head.bias")
    assert layer_groups(network)[-1] == ["head.weight", "head.bias"]
    freeze(network.module, select(network, "head"))
    assert find_cut(network, select(network, "head"), image_size=32) == ("head", "")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network.module.eval()(images)
        torch.testing.assert_close(copy.deepcopy(network.module)(images), expected, rtol=0, atol=0)
        assert meta_copy(network.module)(images.to("meta")).shape == (2, 3)
    folder = model_folder(tmp_path / "model", name="dtl/resnet_tiny")  # the facts beside the network
    from dtl.checkpoint.resume.model_folder import save_model_folder
    from dtl.models.model_json import read_model_json

    facts = read_model_json(folder)
    save_model_folder(
        folder, network.module.state_dict(), architecture={"name": name, "num_classes": 3, "options": options}, classes=facts.classes,
        display_names={}, preprocessing=facts.preprocessing, metrics={}, made_by={},
    )  # fmt: skip
    with torch.inference_mode():
        torch.testing.assert_close(load_network(folder)[1].module.eval()(images), expected, rtol=0, atol=0)


def test_networks_without_tokens_are_refused_in_one_line() -> None:
    none = r"is no vision transformer of timm's with one linear head, so there are no tokens to pool; leave out model\.pool$"
    for name in ("torchvision/resnet18", "timm/swin_tiny_patch4_window7_224", "timm/deit_tiny_distilled_patch16_224"):
        with pytest.raises(UserError, match=f"^model\\.pool avg: {name} {none}"):
            build(name, num_classes=3, options={"pool": "avg"}, meta=True)
    with pytest.raises(UserError, match=r"^model\.pool token\+avg: timm/vit_base_patch16_siglip_224 has no class token; use model\.pool avg, or leave it out"):
        build("timm/vit_base_patch16_siglip_224", num_classes=3, options={**SMALL, "pool": "token+avg"}, meta=True)
    with pytest.raises(UserError, match=r"the option pool is 'max'; it must be one of token, avg, token\+avg"):
        build("torchvision/resnet18", num_classes=3, options={"pool": "max"}, meta=True)
    with pytest.raises(UserError, match=r"^model\.pool avg: networks:small is a function of your own, which pools itself; leave out model\.pool"):
        options_of(load_config(["--model.name", "networks:small", "--model.pool", "avg"])[0].model)
