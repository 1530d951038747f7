"""Pairs of networks with known truth for `benchmarks/transfer.py`: which source tensor is which target tensor.

Truth is by construction (a network edited, its names changed), or, between torchvision and timm, the order of first use,
confirmed by equal outputs of both networks after copying random weights along it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

State = dict[str, torch.Tensor]
Rename = Callable[[str], str]


@dataclass
class Pair:
    """`truth`: target tensor -> source tensor (a tuple where several are joined), floating tensors only, the head apart."""

    name: str
    group: str
    source: State
    target: nn.Module
    truth: dict[str, Any]
    source_model: nn.Module | None = None


# --- names ---


def keep(name: str) -> str:
    return name


def hash_all(name: str) -> str:
    return "t" + hashlib.sha1(name.encode()).hexdigest()[:10]


def hash_parts(name: str) -> str:
    *path, word = name.split(".")
    return ".".join([*("m" + hashlib.sha1(part.encode()).hexdigest()[:6] for part in path), word])


def other_words(name: str) -> str:
    for old, new in (("layer", "stage"), ("conv", "c"), ("bn", "norm"), ("downsample", "shortcut"), ("features", "trunk")):
        name = name.replace(old, new)
    return name


def wrapped(name: str) -> str:
    return "module._orig_mod.backbone." + name


RENAMINGS: dict[str, Rename] = {"names kept": keep, "all hashed": hash_all, "parts hashed": hash_parts, "other words": other_words}


def state_of(model: nn.Module, rename: Rename = keep) -> State:
    return {rename(name): value for name, value in model.state_dict().items()}


def learned(model: nn.Module) -> list[str]:
    return [name for name, value in model.state_dict().items() if value.is_floating_point()]


def meta(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Built without memory where the builder allows it (torchvision's RegNets compute their widths with tensors)."""
    try:
        with torch.device("meta"):
            return build(*args, **kwargs)
    except NotImplementedError:
        return build(*args, **kwargs)


# --- edits of torchvision's ResNets ---


def _resnet(depth: int, *, classes: int = 1000, channels: int = 3) -> nn.Module:
    from torchvision import models

    def build() -> nn.Module:
        model: nn.Module = getattr(models, f"resnet{depth}")(num_classes=classes)
        if channels != 3:
            model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return model

    return meta(build)


def _edit_blocks(model: nn.Module, stage: str, *, insert: int | None = None, remove: int | None = None) -> dict[int, int]:
    """Insert a copy of the last block at a place, or remove one; new number -> old number of the blocks that stayed."""
    blocks = list(getattr(model, stage))
    numbers: list[int | None] = list(range(len(blocks)))
    if insert is not None:
        blocks.insert(insert, copy.deepcopy(blocks[-1]))
        numbers.insert(insert, None)
    if remove is not None:
        del blocks[remove], numbers[remove]
    setattr(model, stage, nn.Sequential(*blocks))
    return {new: old for new, old in enumerate(numbers) if old is not None}


def _block_truth(target: nn.Module, stage: str, moved: dict[int, int], rename: Rename) -> dict[str, str]:
    truth = {}
    for name in learned(target):
        if name.startswith("fc."):
            continue
        old = name
        if name.startswith(stage + "."):
            number, rest = name.removeprefix(stage + ".").split(".", 1)
            if int(number) not in moved:
                continue
            old = f"{stage}.{moved[int(number)]}.{rest}"
        truth[name] = rename(old)
    return truth


def edits() -> Iterator[Pair]:
    for depth, stage in ((18, "layer2"), (50, "layer3")):
        source = _resnet(depth)
        for words, rename in RENAMINGS.items():
            cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
                ("10 classes", {"classes": 10}, {}),
                ("1 channel", {"channels": 1}, {}),
                ("4 channels, 10 classes", {"classes": 10, "channels": 4}, {}),
                ("block added at the end", {}, {"insert": len(getattr(source, stage))}),
                ("block removed at the end", {}, {"remove": len(getattr(source, stage)) - 1}),
            ]
            if rename in (hash_all, hash_parts):
                cases.append(("block added in the middle, 10 classes, 4 channels", {"classes": 10, "channels": 4}, {"insert": 1}))
                cases.append(("block removed in the middle", {}, {"remove": 1}))
            for name, options, blocks in cases:
                target = _resnet(depth, **options)
                count = len(getattr(target, stage))
                moved = _edit_blocks(target, stage, **blocks) if blocks else {n: n for n in range(count)}
                truth = _block_truth(target, stage, moved, rename)
                if "classes" not in options:
                    truth |= {name: rename(name) for name in ("fc.weight", "fc.bias")}
                yield Pair(f"resnet{depth}, {words}: {name}", "edits", state_of(source, rename), target, truth, source)


# --- the tutorials' ResNet ---


def tutorial_resnet(classes: int) -> nn.Module:
    from dtl.models.plain_resnet import resnet18_plain

    return meta(resnet18_plain, num_classes=classes)


def tutorial_name(name: str) -> str | None:
    """torchvision's name of a tensor of the tutorials' ResNet-18; None where torchvision has none."""
    if name.startswith("0."):
        return {"0.0.weight": "conv1.weight"}.get(name) or (name.replace("0.1.", "bn1.") if name.startswith("0.1.") else None)
    stage, _, rest = name.partition(".")
    if not stage.isdigit() or int(stage) > 4 or rest.endswith(("conv1.bias", "conv2.bias", "conv3.bias")):
        return None
    return f"layer{stage}.{rest}".replace("conv3", "downsample.0")


def tutorial() -> Iterator[Pair]:
    theirs = _resnet(18)
    for words, rename in RENAMINGS.items():
        ours = tutorial_resnet(10)
        names = {name: tutorial_name(name) for name in learned(ours)}
        forward = {name: rename(other) for name, other in names.items() if other}
        yield Pair(f"resnet18 -> tutorial, {words}", "tutorial", state_of(theirs, rename), tutorial_resnet(10), forward, theirs)
        backward = {other: rename(name) for name, other in names.items() if other}
        yield Pair(f"tutorial -> resnet18, {words}", "tutorial", state_of(ours, rename), _resnet(18), backward, ours)


# --- torchvision and timm ---

FAMILIES = [
    ("resnet18", "resnet18"),
    ("resnet50", "resnet50"),
    ("mobilenet_v2", "mobilenetv2_100"),
    ("efficientnet_b0", "efficientnet_b0"),
    ("vit_b_16", "vit_base_patch16_224"),
    ("convnext_tiny", "convnext_tiny"),
    ("densenet121", "densenet121"),
    ("swin_t", "swin_tiny_patch4_window7_224"),
    ("regnet_y_1_6gf", "regnety_016"),
    ("vgg16_bn", "vgg16_bn"),
    ("mnasnet1_0", "mnasnet_100"),
    ("resnext50_32x4d", "resnext50_32x4d"),
    ("regnet_x_800mf", "regnetx_008"),
    ("mobilenet_v3_large", "mobilenetv3_large_100"),
    ("wide_resnet50_2", "wide_resnet50_2"),
]

# More of the kind, with their names kept only: building and running them to confirm the truth is what takes time.
MORE_FAMILIES = [
    ("efficientnet_b3", "efficientnet_b3"),
    ("efficientnet_v2_m", "efficientnetv2_m"),
    ("mobilenet_v3_small", "mobilenetv3_small_100"),
    ("convnext_base", "convnext_base"),
    ("vit_b_32", "vit_base_patch32_224"),
    ("vgg11", "vgg11"),
    ("densenet161", "densenet161"),
]
KEPT = (("names kept", keep),)
NAMINGS = (*KEPT, ("sorted", keep), ("all hashed", hash_all))


def families() -> Iterator[Pair]:
    import timm
    from torchvision import models

    for ours, theirs in (*FAMILIES, *MORE_FAMILIES):
        a, b = meta(models.get_model, ours), meta(timm.create_model, theirs)
        truth = confirmed_truth(ours, theirs, a, b)
        if truth is None:
            print(f"{ours} <-> {theirs}: no truth could be confirmed, left out")
            continue
        back = {source: target for target, source in truth.items()}
        for words, rename in NAMINGS if (ours, theirs) in FAMILIES else KEPT:
            for name, source, target, pairs in ((f"{ours} -> timm", a, b, truth), (f"timm -> {ours}", b, a, back)):
                state = state_of(source, rename)
                if words == "sorted":
                    state = dict(sorted(state.items()))
                renamed = {t: rename(s) for t, s in pairs.items()}
                yield Pair(f"{name}, {words}", "torchvision <-> timm", state, target, renamed, source)


def confirmed_truth(ours: str, theirs: str, a: nn.Module, b: nn.Module) -> dict[str, str] | None:
    """timm tensor -> torchvision tensor, if copying random weights along it gives equal outputs."""
    import timm
    from torchvision import models

    from dtl.checkpoint.transfer.layers.dataflow import trace_dataflow
    from dtl.checkpoint.transfer.plan import plan_transfer
    from dtl.checkpoint.transfer.verify import randomise

    hypotheses = []
    flows = trace_dataflow(a), trace_dataflow(b)
    if flows[0] and flows[1]:
        used = [[n for n in flow.order if n in set(learned(m))] for flow, m in zip(flows, (a, b)) if flow]
        if len(used[0]) == len(used[1]):
            hypotheses.append(dict(zip(used[1], used[0])))
    hypotheses.append({t: s for t, s in plan_transfer(a.state_dict(), b, source_model=a).pairs.items() if isinstance(s, str)})
    real_a, real_b = models.get_model(ours).eval(), timm.create_model(theirs).eval()
    randomise(real_a)
    randomise(real_b)
    for truth in hypotheses:
        truth = {t: s for t, s in truth.items() if t in set(learned(b))}
        if set(truth) >= set(dict(real_b.named_parameters())) and _same_function(real_a, real_b, truth):
            return truth
    return None


def _same_function(a: nn.Module, b: nn.Module, truth: dict[str, str]) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    if any(ours[s].numel() != theirs[t].numel() for t, s in truth.items()):
        return False
    with torch.no_grad():
        for target, source in truth.items():
            theirs[target].copy_(ours[source].reshape(theirs[target].shape))
        for module in (*a.modules(), *b.modules()):
            # timm and torchvision differ in eps; the map is what is tested.
            if hasattr(module, "eps"):
                module.eps = 1e-5  # type: ignore[assignment]
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        x, y = a(images), b(images)
    return bool((x - y).norm() <= 1e-4 * x.norm())
