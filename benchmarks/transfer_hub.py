"""Weights written by other packages themselves, loaded into timm's networks and back: is the function the same?

    python -m benchmarks.transfer_hub [--only TEXT] [--out FILE.json]

It needs transformers, open_clip, peft and segmentation_models_pytorch, each case only its own; dtl needs none of them. Each network is small and random, and
saved by its package (`save_pretrained`), so nothing is downloaded. A case is right if dtl loads it by default and the outputs agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import VisionTransformer

from benchmarks.transfer_cases import trained, vit
from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.source.arch import source_network
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.errors import UserError

Tokens = Callable[[nn.Module, torch.Tensor], torch.Tensor]
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE: dict[str, Any] = {**SIZE, "intermediate_size": 128}


def _of_hub(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return torch.as_tensor(getattr(found, name))
    raise AssertionError(type(found))


def _hidden(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(images).last_hidden_state)


def _features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.forward_features(images)  # type: ignore[operator]


def _plain(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


def hub(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


def timm_class(where: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module, name = where.split(":")
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(**options)

    return build


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def _vit(**options: Any) -> Callable[[], nn.Module]:
    return timm_class("vision_transformer:VisionTransformer", **{**VIT, **options})


QUICK = {"act_layer": "quick_gelu"}
PAIRS: list[tuple[str, Callable[[], nn.Module], Tokens, Callable[[], nn.Module], Tokens]] = [
    ("ViT", hub("ViTForImageClassification", "ViTConfig", **WIDE, num_labels=5), _of_hub, _vit(num_classes=5), _plain),
    ("DeiT", hub("DeiTModel", "DeiTConfig", **WIDE), _hidden, timm_class("deit:VisionTransformerDistilled", **VIT, num_classes=0), _features),
    (
        "BEiT",
        hub("BeitForImageClassification", "BeitConfig", **WIDE, num_labels=5, use_relative_position_bias=True, use_mean_pooling=True),
        _of_hub,
        timm_class("beit:Beit", **VIT, num_classes=5, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
        _plain,
    ),
    (
        "Swin",
        hub(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
        ),
        _of_hub,
        timm_class("swin_transformer:SwinTransformer", img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5),
        _plain,
    ),
    ("DINOv2", hub("Dinov2Model", "Dinov2Config", **SIZE), _hidden, _vit(num_classes=0, init_values=1.0), _features),
    (
        "DINOv2 with registers",
        hub("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SIZE, num_register_tokens=4),
        _hidden,
        _vit(num_classes=0, init_values=1.0, reg_tokens=4, no_embed_class=True),
        _features,
    ),
    (
        "DINOv3",
        hub("DINOv3ViTModel", "DINOv3ViTConfig", **WIDE, num_register_tokens=4),
        _hidden,
        timm_class(
            "eva:Eva",
            **VIT,
            num_classes=0,
            qkv_bias=True,
            init_values=1e-5,
            num_reg_tokens=4,
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            rope_type="dinov3",
            rope_rotate_half=True,
            rope_temperature=100,
            use_fc_norm=False,
            norm_layer=lambda width, **more: nn.LayerNorm(width, eps=1e-5),
            qkv_fused=False,
        ),
        _features,
    ),
    ("CLIP", hub("CLIPVisionModel", "CLIPVisionConfig", **WIDE), _of_hub, _vit(num_classes=0, pre_norm=True, **QUICK), _plain),
    (
        "SigLIP",
        hub("SiglipVisionModel", "SiglipVisionConfig", **WIDE),
        _of_hub,
        _vit(num_classes=0, class_token=False, global_pool="map", act_layer="gelu_tanh"),
        _plain,
    ),
]


def outcome(
    source: nn.Module, weights: Any, target: nn.Module, of_source: Tokens, of_target: Tokens, *, arch: str | None = None, adapter: str | None = None
) -> str:
    try:
        read = read_weights(weights)
        report = load_pretrained(
            target, read, keep_head=True if adapter else None, adapter=adapter, source_model=source_network(arch, read, 5) if arch else None
        )
    except UserError as error:
        return f"refused: {str(error).splitlines()[0][:400]}"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, y = of_source(source.eval(), images), of_target(target.eval(), images)
    if x.shape != y.shape:
        return f"loaded, other shapes: {list(x.shape)}, {list(y.shape)}"
    difference = float((x - y).norm() / x.norm())
    return f"right ({difference:.1e})" if difference < 1e-3 else f"false: outputs differ by {difference:.2g}; random: {list(report.plan.random)[:4]}"


def _saved(model: nn.Module, folder: str) -> str:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def _open_clip(folder: str) -> str:
    clip = importlib.import_module("open_clip.transformer").VisionTransformer(32, 8, 32, 3, 2, 4.0, output_dim=16)
    clip.proj = None
    state = {f"visual.{name}": value for name, value in trained(clip).state_dict().items()}
    torch.save(state, f"{folder}/open_clip.pt")
    return outcome(clip, f"{folder}/open_clip.pt", _vit(num_classes=0, pre_norm=True)(), _plain, _plain)


def _resnet() -> nn.Module:
    return importlib.import_module("timm").create_model("resnet18", num_classes=5)


def _peft(folder: str, build: Callable[[], nn.Module] = vit, *, how: str = "base", into: Callable[[], nn.Module] | None = None, **options: Any) -> str:
    """An adapter over the network that `build` makes. `how`: merged by peft; its folder alone; or with its base. `into`: another network than the base."""
    peft = importlib.import_module("peft")
    base, target = trained(build()), (into or build)()
    weights: Any = {name: value.clone() for name, value in base.state_dict().items()} if into is None else _saved(base, f"{folder}/base")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "init_lora_weights": False, **options}))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    plain = _plain if into is None else lambda model, images: _of_hub(model.base_model.model, images)
    if how == "merged":
        return outcome(wrapped, wrapped.merge_and_unload().state_dict(), target, plain, _plain)
    wrapped.save_pretrained(folder)
    return outcome(wrapped, folder, target, plain, _plain) if how == "alone" else outcome(wrapped, weights, target, plain, _plain, adapter=folder)


def _segmentation(folder: str) -> str:
    """The encoder of a U-Net, into torchvision's ResNet."""
    from torchvision.models import resnet18

    smp = importlib.import_module("segmentation_models_pytorch")
    unet = trained(smp.Unet("resnet18", encoder_weights=None))
    torch.save(unet.state_dict(), f"{folder}/unet.pth")
    target = resnet18()

    def last(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return model.encoder(images)[-1]  # type: ignore[operator]

    def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return nn.Sequential(*list(model.children())[:-2])(images)

    return outcome(unet, f"{folder}/unet.pth", target, last, features)


OTHERS: dict[str, Callable[[str], str]] = {
    "open_clip's vision tower -> timm": _open_clip,
    "peft, merged -> timm": partial(_peft, how="merged", target_modules=["qkv"]),
    "peft, the adapter's folder -> timm": partial(_peft, how="alone", target_modules=["qkv"]),
    "peft, LoRA over its base": partial(_peft, target_modules=["qkv"], modules_to_save=["head"]),
    "peft, rank-stabilised, ranks and alphas by pattern": partial(
        _peft, target_modules=["qkv", "fc1"], use_rslora=True, rank_pattern={"blocks.1.attn.qkv": 3, "fc1": 4}, alpha_pattern={"fc1": 5}
    ),
    "peft, with biases of LoRA": partial(_peft, target_modules=["qkv", "fc2"], lora_bias=True),
    "peft, DoRA and all biases": partial(_peft, target_modules=["qkv", "fc1"], use_dora=True, bias="all"),
    "peft, LoRA of convolutions": partial(_peft, build=_resnet, target_modules=["conv1", "conv2", "fc"], modules_to_save=["bn1"]),
    "peft, DoRA of convolutions": partial(_peft, build=_resnet, target_modules=["conv1", "conv2"], use_dora=True, bias="lora_only"),
    "peft, LoRA of transformers' ViT -> timm": partial(
        _peft, build=PAIRS[0][1], into=_vit(num_classes=5), target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    ),
    "peft, PiSSA": partial(_peft, target_modules=["qkv"], init_lora_weights="pissa"),
    "peft, LoRA of torchvision's attention": partial(_peft, build=lambda: VisionTransformer(32, 8, 2, 2, 32, 64), target_modules=["self_attention"]),
    "segmentation_models_pytorch, the encoder of a U-Net -> torchvision": _segmentation,
}


def results(only: str = "") -> dict[str, str]:
    found = {}
    cases: dict[str, Callable[[str], str]] = {}
    for name, theirs, of_theirs, ours, of_ours in PAIRS:

        def there(folder: str, a: Any = theirs, b: Any = ours, x: Tokens = of_theirs, y: Tokens = of_ours) -> str:
            source = trained(a())
            return outcome(source, _saved(source, folder), b(), x, y)

        def by_arch(folder: str, a: Any = theirs, b: Any = ours, x: Tokens = of_theirs, y: Tokens = of_ours) -> str:
            source = trained(a())
            return outcome(source, _saved(source, folder), b(), x, y, arch=f"transformers:{type(source).__name__}")

        def back(folder: str, a: Any = theirs, b: Any = ours, x: Tokens = of_theirs, y: Tokens = of_ours) -> str:
            source = trained(b())
            return outcome(source, source.state_dict(), a(), y, x)

        cases |= {f"transformers' {name} -> timm": there, f"transformers' {name} -> timm, source_arch": by_arch, f"timm -> transformers' {name}": back}
    for name, case in {**cases, **OTHERS}.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = case(folder)
            except ImportError as error:
                found[name] = f"not run: {error}"
            except Exception as error:
                found[name] = f"crash: {type(error).__name__} {error}"
        print(f"{name:70} {found[name]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = results(options.only)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(result.startswith(("false", "crash")) for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
