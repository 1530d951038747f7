"""Parameter groups with their own learning rates and weight decay, and the optimizer over them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dtl.errors import UserError
from dtl.imports import optimizers_without_compiler

_log = logging.getLogger(__name__)
# Embeddings and tokens are not multiplied with an input; torchvision's references exclude them from weight decay too.
_EMBEDDINGS = ("pos_embedding", "pos_embed", "class_token", "cls_token", "dist_token", "reg_token", "relative_position_bias_table")
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Bilinear)


def build_groups(
    module: nn.Module,
    trainable: Collection[str],
    *,
    layer_groups: Sequence[Sequence[str]],
    head_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    decay_norms_and_biases: bool = False,
) -> list[dict[str, Any]]:
    """Groups with `params`, `names`, `lr_scale`, `weight_decay`: every trainable parameter in exactly one, in one fixed order.

    `layer_groups` are parameter names from input to head (`dtl.models.groups.layer_groups`), the last one the head. Layer-wise decay
    as in ELECTRA (Clark et al. 2020) and BEiT: a group `d` groups before the head learns at layer_decay ** d; the head at head_lr_scale.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay must be in (0, 1], not {layer_decay}")
    if head_lr_scale <= 0:
        raise UserError(f"head_lr_scale must be positive, not {head_lr_scale}")
    if weight_decay < 0:
        raise UserError(f"weight_decay must not be negative, not {weight_decay}")
    if not trainable:
        raise UserError("train: no parameter is left to train")
    depth = {name: i for i, group in enumerate(layer_groups) for name in group}
    head_depth = len(layer_groups) - 1
    undecayed = frozenset() if decay_norms_and_biases else undecayed_names(module)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if name not in trainable:
            continue
        distance = head_depth - depth[name]
        scale = head_lr_scale if distance == 0 else layer_decay**distance
        decay = 0.0 if name in undecayed else weight_decay
        # One group for all parameters with the same scale and decay: few groups, large fused updates.
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    # From the input to the head, the decayed ones first.
    return sorted(groups.values(), key=lambda group: (-max(head_depth - depth[name] for name in group["names"]), -group["weight_decay"]))


def undecayed_names(module: nn.Module) -> frozenset[str]:
    """Parameters that weight decay usually spares: norms, biases, scales, tokens and position embeddings, and what timm's models list."""
    listed: Any = getattr(module, "no_weight_decay", None)
    names: set[str] = set(listed()) if callable(listed) else set()
    for prefix, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            weight = isinstance(part, _WEIGHT_LAYERS) and not key.endswith("bias") and "bias" not in key
            # Layer scales come as (C,) and as (C, 1, 1): one number for a channel either way.
            if not weight and (parameter.squeeze().ndim <= 1 or key.endswith(_EMBEDDINGS)):
                names.add(f"{prefix}.{key}" if prefix else key)
    return frozenset(names)


def build_optimizer(
    groups: list[dict[str, Any]],
    name: Literal["sgd", "adam", "adamw"] | str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    fused: bool | Literal["auto"] = "auto",
) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over `groups`; each group starts at lr * lr_scale. The caller sets `group["lr"]` before each step.

    `fused="auto"` uses torch's fused kernels where the parameters' devices and types have them (CPU included), and logs it if they have not.
    """
    if name == "solve":
        with optimizers_without_compiler():
            return torch.optim.SGD(groups, lr=lr)  # takes no step: it holds the groups
    if name not in ("sgd", "adam", "adamw"):
        raise UserError(f"optimizer must be sgd, adam or adamw, not {name!r}")
    if nesterov and momentum == 0:
        raise UserError("nesterov needs momentum above 0")
    refusal = _why_not_fused([parameter for group in groups for parameter in group["params"]])
    if fused is True and refusal:
        raise UserError(f"optimizer: fused=true is not possible: {refusal}")
    if fused == "auto" and refusal:
        _log.info("optimizer: fused kernels not used: %s", refusal)
    use_fused = not refusal if fused == "auto" else bool(fused)
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    with optimizers_without_compiler():
        if name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=use_fused)
            if use_fused and momentum:
                _begin_momentum(optimizer)
            return optimizer
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=betas, fused=use_fused)


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum from zero, which gives the first step's values as they are. Left to itself the fused kernel takes memory as it finds it, and
    where fp16's first step overflows, which its scaler expects, it returns before writing any: the next step would start from rubbish."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _why_not_fused(parameters: list[nn.Parameter]) -> str:
    """Empty when torch's fused optimizers take all these parameters."""
    supported = ("cuda", "cpu", "mps", "xpu")
    for parameter in parameters:
        if parameter.device.type not in supported:
            return f"no fused kernel for the device {parameter.device.type}"
        if not torch.is_floating_point(parameter):
            return f"no fused kernel for {parameter.dtype}"
    return ""
