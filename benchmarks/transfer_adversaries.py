"""Pairs made to mislead: for `benchmarks/transfer.py`. A pair whose truth is empty must load nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.transfer_pairs import (
    RENAMINGS,
    Pair,
    hash_all,
    hash_parts,
    learned,
    meta,
    other_words,
    state_of,
    tutorial_name,
    tutorial_resnet,
    wrapped,
)


def adversaries() -> Iterator[Pair]:
    yield from other_networks()
    yield from registration()
    yield from changed_layers()
    yield from attention()
    yield from layouts()


def _model(name: str, **options: Any) -> nn.Module:
    import timm
    from torchvision import models

    if name.startswith("timm/"):
        return meta(timm.create_model, name.removeprefix("timm/"), **options)
    return meta(models.get_model, name, **options)


def other_networks() -> Iterator[Pair]:
    """Weights of another architecture, some of them with the same names."""
    for source, target in (
        ("resnet50", "resnet18"),
        ("resnet18", "resnet50"),
        ("resnet101", "resnet50"),
        ("resnet34", "resnet18"),
        ("convnext_small", "convnext_tiny"),
        ("vgg16", "vgg11"),
        ("vgg16_bn", "resnet18"),
        ("mobilenet_v2", "resnet18"),
        ("efficientnet_b0", "mobilenet_v2"),
        ("mobilenet_v2", "efficientnet_b0"),
        ("densenet121", "resnet50"),
        ("timm/vit_tiny_patch16_224", "timm/vit_small_patch16_224"),
    ):
        yield Pair(f"{source} -> {target}, another network", "adversarial", state_of(_model(source)), _model(target), {})


class _Reordered(nn.Module):
    """Registers its convolutions (all 3x3, one width) in an order that is not the order of use."""

    def __init__(self, order: list[int], width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.num = len(order)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for n in order:
            setattr(self, f"conv{n}", nn.Conv2d(width, width, 3, padding=1, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for n in range(self.num):
            x = torch.relu(getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x)))
        return self.fc(x.mean((2, 3)))


def registration() -> Iterator[Pair]:
    plain, orders = list(range(8)), {"swapped": [0, 2, 1, 3, 4, 6, 5, 7], "reversed": list(range(8))[::-1]}
    for name, order in orders.items():
        for words, rename in RENAMINGS.items():
            for side, ours, theirs in (("target", plain, order), ("source", order, plain)):
                source, target = meta(_Reordered, ours), meta(_Reordered, theirs)
                truth = {t: rename(t) for t in learned(target)}
                yield Pair(f"registration {name} in the {side}, {words}", "adversarial", state_of(source, rename), target, truth, source)


def changed_layers() -> Iterator[Pair]:
    source = _model("resnet50")
    target = _model("resnet50")
    for name, module in list(target.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent = target.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], meta(nn.GroupNorm, 32, module.num_features))
    norms = {n.rpartition(".")[0] for n in source.state_dict() if n.endswith("running_mean")}
    truth = {t: t for t in learned(target) if t.rpartition(".")[0] not in norms}
    yield Pair("resnet50 -> with group norms", "adversarial", state_of(source), target, truth)

    target = _model("timm/seresnet50")
    truth = {t: hash_all(t) for t in learned(target) if t in source.state_dict()}
    yield Pair("resnet50 hashed -> seresnet50", "adversarial", state_of(source, hash_all), target, truth, source)

    small = _model("resnet18")
    target = _model("timm/resnet18d")
    same = {t for t in learned(target) if t in small.state_dict() and small.state_dict()[t].shape == target.state_dict()[t].shape}
    # The deep stem and the pooled shortcut are other layers; what follows a new layer is not the old norm's place.
    truth = {t: t for t in same if not t.startswith(("conv1", "bn1"))}
    truth = {t: s for t, s in truth.items() if "downsample" not in t}
    for stage in "234":
        truth[f"layer{stage}.0.downsample.1.weight"] = f"layer{stage}.0.downsample.0.weight"
        for role in ("weight", "bias", "running_mean", "running_var"):
            truth[f"layer{stage}.0.downsample.2.{role}"] = f"layer{stage}.0.downsample.1.{role}"
    yield Pair("resnet18 -> resnet18d", "adversarial", state_of(small), target, truth)

    source = _model("vgg16_bn")
    target = _model("vgg16_bn")
    layers = list(target.features)  # type: ignore[arg-type]
    layers.insert(7, meta(nn.Conv2d, 64, 64, 3, padding=1))
    target.features = nn.Sequential(*layers)
    truth = {}
    for name in learned(target):
        part = name.split(".")
        if part[0] == "features" and int(part[1]) == 7:
            continue
        shift = part[0] == "features" and int(part[1]) > 7
        truth[name] = ".".join([part[0], str(int(part[1]) - shift), *part[2:]])
    yield Pair("vgg16_bn -> a convolution inserted, numbers shifted", "adversarial", state_of(source), target, truth, source)

    source, target = _model("resnet18"), _model("resnet18")
    target.layer3[1].conv1 = meta(nn.Conv2d, 256, 128, 3, padding=1, bias=False)  # type: ignore[index, union-attr]
    target.layer3[1].bn1 = meta(nn.BatchNorm2d, 128)  # type: ignore[index, union-attr]
    target.layer3[1].conv2 = meta(nn.Conv2d, 128, 256, 3, padding=1, bias=False)  # type: ignore[index, union-attr]
    truth = {t: t for t in learned(target) if not t.startswith(("layer3.1.conv", "layer3.1.bn"))}
    yield Pair("resnet18 -> one block of another width", "adversarial", state_of(source), target, truth, source)


class _SeparateBlock(nn.Module):
    """Attention with q, k and v apart, registered in a given order, norms last."""

    def __init__(self, width: int, order: str) -> None:
        super().__init__()
        for word in order.split():
            setattr(self, word, nn.Linear(width, width))
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_before, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_before(x)
        q, k, v = self.query(y), self.key(y), self.value(y)  # type: ignore[operator]
        x = x + self.output(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm_after(x))))


class _SeparateViT(nn.Module):
    def __init__(self, order: str = "query key value", width: int = 192, depth: int = 4, classes: int = 1000) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 197, width))
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.layer = nn.ModuleList([_SeparateBlock(width, order) for _ in range(depth)])
        self.layernorm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embeddings
        for block in self.layer:
            x = block(x)
        return self.classifier(self.layernorm(x)[:, 0])


_VIT_NAMES = {
    "attn.proj": "output",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "norm1": "norm_before",
    "norm2": "norm_after",
}


def attention() -> Iterator[Pair]:
    for order in ("query key value", "value key query"):
        separate = meta(_SeparateViT, order)
        fused = _model("timm/vit_tiny_patch16_224", depth=4)
        truth: dict[str, Any] = {
            "cls_token": "cls_token",
            "pos_embed": "position_embeddings",
            **{f"patch_embed.proj.{r}": f"patches.{r}" for r in ("weight", "bias")},
            **{f"norm.{r}": f"layernorm.{r}" for r in ("weight", "bias")},
            **{f"head.{r}": f"classifier.{r}" for r in ("weight", "bias")},
        }
        parts: dict[str, str] = {}
        for n in range(4):
            for role in ("weight", "bias"):
                truth |= {f"blocks.{n}.{a}.{role}": f"layer.{n}.{b}.{role}" for a, b in _VIT_NAMES.items()}
                truth[f"blocks.{n}.attn.qkv.{role}"] = tuple(f"layer.{n}.{w}.{role}" for w in ("query", "key", "value"))
                parts |= {f"layer.{n}.{w}.{role}": f"blocks.{n}.attn.qkv.{role}" for w in ("query", "key", "value")}
        yield Pair(f"separate {order} -> fused", "adversarial", state_of(separate), fused, truth, separate)
        back = {s: t for t, s in truth.items() if isinstance(s, str)} | parts
        yield Pair(f"fused -> separate {order}", "adversarial", state_of(fused), separate, back, fused)
        hashed = {t: tuple(map(hash_all, s)) if isinstance(s, tuple) else hash_all(s) for t, s in truth.items()}
        yield Pair(f"separate {order}, hashed -> fused", "adversarial", state_of(separate, hash_all), fused, hashed)


def layouts() -> Iterator[Pair]:
    source, target = _model("resnet18"), _model("resnet18", num_classes=10)
    body = [t for t in learned(target) if not t.startswith("fc.")]
    yield Pair("wrapped three times", "adversarial", state_of(source, wrapped), target, {t: wrapped(t) for t in body})
    yield from _backbones()
    query = {f"encoder_q.{n}": v for n, v in source.state_dict().items()}
    key = {f"encoder_k.{n}": v for n, v in source.state_dict().items()}
    yield Pair("MoCo: encoder_q and encoder_k", "adversarial", query | key, target, {})
    old = OrderedDict((n, v) for n, v in source.state_dict().items() if "num_batches" not in n)
    yield Pair("no counters", "adversarial", dict(old), target, {t: t for t in body})
    ours = tutorial_resnet(10)
    names = {name: tutorial_name(name) for name in learned(ours)}
    truth = {name: hash_all(other) for name, other in names.items() if other}
    yield Pair("no counters, hashed -> tutorial", "adversarial", {hash_all(n): v for n, v in old.items()}, ours, truth, source)
    dense = _model("densenet121")
    legacy = {_legacy(n): v for n, v in dense.state_dict().items() if "num_batches" not in n}
    yield Pair("legacy densenet names", "adversarial", legacy, _model("densenet121"), {t: _legacy(t) for t in learned(dense)})
    for words, rename in (("parts hashed", hash_parts), ("other words", other_words)):
        state = dict(sorted(state_of(source, rename).items()))
        yield Pair(f"sorted, {words}", "adversarial", state, copy.deepcopy(target), {t: rename(t) for t in body})


def _backbones() -> Iterator[Pair]:
    """A detector and a segmentation network, of which only the backbone is wanted."""
    from torchvision.models import detection, segmentation

    without: dict[str, Any] = {"weights": None, "weights_backbone": None}
    for build, prefix in ((detection.fasterrcnn_resnet50_fpn, "backbone.body."), (segmentation.deeplabv3_resnet50, "backbone.")):
        target = _model("resnet50")
        body = {t: prefix + t for t in learned(target) if not t.startswith("fc.")}
        yield Pair(f"{build.__name__} -> resnet50", "adversarial", state_of(meta(build, **without)), target, body)


def _legacy(name: str) -> str:
    for word in ("norm", "conv"):
        for n in "12":
            name = name.replace(f".{word}{n}.", f".{word}.{n}.") if "denselayer" in name else name
    return name
