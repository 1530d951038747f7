"""Weights as people meet them, each with what dtl makes of it today. The list only grows.

    python -m benchmarks.transfer_cases [--only TEXT] [--point N]

One case is one way in which weights and a network differ in practice, built small from torch, torchvision and timm alone. `wanted` says what is right
for it, `today` what dtl does; the test beside `dtl.checkpoint.transfer.apply` holds `today`, so that a change of either is seen. Truth is the function:
loaded is right where the network computes what the source computed, on random weights and images.

    right      loaded by default
    followed   refused, and right once the advice in the first line of the message was followed, as a machine reads it
    reported   not all can be loaded (or is wanted), and the warnings, the first lines of the report, say so with names; perhaps after a refusal's advice
    named      refused, and the message names what the file is
    refused    refused, with no advice that helps
    silent     loaded, computes something else, and the first lines of the report do not say so
    false      a wrong pair in the plan, be it refused or not
    crash      anything but a UserError
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dtl.checkpoint import load_pretrained, plan_transfer
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.checkpoint.transfer.verify import randomise
from dtl.errors import UserError

State = dict[str, torch.Tensor]


@dataclass
class Trial:
    """Weights and the network that is to get them. `same`: the network whose function it must have then; None: nothing can be equal.

    `truth`: target tensor -> source tensor where it is known; a pair against it is false in any plan. `names`: words that a refusal must hold to be `named`.
    """

    source: Any
    target: nn.Module
    same: nn.Module | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 32


@dataclass(frozen=True)
class Case:
    """`point`: of the issue "Weight transfer, second round" that describes it."""

    name: str
    point: int
    build: Callable[[Path], Trial]
    wanted: str
    today: str


# --- the outcome of a case ---

_ADVICE = re.compile(r"(fresh|ignore|min_coverage|assume_order|keep_head|fill|fold_norms): (\[[^\]]*\]|\{[^}]*\}|[\w.]+)")
_LINE = re.compile(r"write into a map: (\S+): (\{[^}]*\}|\[[^\]]*\]|\S+)")
_CHOICE = re.compile(r"source: \S+#(\S+)")


def advice(message: str) -> dict[str, Any]:
    """The options that a message advises, as a machine reads it: `set NAME: VALUE`, `write into a map: LINE`, `source: FILE#KEY`."""
    found: dict[str, Any] = {}
    if line := _LINE.search(message):
        target, source = line.groups()
        return {"mapping": {target: yaml.safe_load(source)}}
    if choice := _CHOICE.search(message):
        return {"key": choice.group(1)}
    for name, value in _ADVICE.findall(message.rpartition(" set ")[2]):
        found[name] = yaml.safe_load(value)
    return found


def outcome(case: Case, folder: Path) -> str:
    """What dtl makes of a case, in one of the words above."""
    torch.manual_seed(0)
    trial = case.build(folder)
    try:
        if trial.truth and _false_pairs(trial):
            return "false"
        return _of_trial(trial)
    except UserError:
        raise
    except Exception:
        return "crash"


def _false_pairs(trial: Trial) -> dict[str, Any]:
    try:
        tensors = read_weights(trial.source).tensors
        plans = [plan_transfer(tensors, trial.target, **trial.options), plan_transfer(tensors, trial.target, on_ambiguous="fresh", **trial.options)]
    except UserError:
        return {}
    pairs = [pair for plan in plans for pair in plan.pairs.items()]
    return {target: source for target, source in pairs if not target.endswith("num_batches_tracked") and trial.truth.get(target) != source}


def _of_trial(trial: Trial) -> str:
    options, followed = dict(trial.options), False
    for _ in range(2):
        before = {name: value.clone() for name, value in trial.target.state_dict().items() if not value.is_meta}
        try:
            report = load_pretrained(trial.target, trial.source, **options)
        except UserError as error:
            assert all(torch.equal(value, trial.target.state_dict()[name]) for name, value in before.items()), "a refusal changed the network"
            first = str(error).split("\n")[0]
            if trial.names and all(word in first for word in trial.names):
                return "named"
            advised = advice(first)
            if followed or not advised:
                return "refused"
            options, followed = {**options, **advised}, True
            continue
        if trial.same is not None and _equal(trial.same, trial.target, trial.size):
            return "followed" if followed else "right"
        if trial.same is None and not trial.names and not report.fresh:
            return "followed" if followed else "right"
        first = " ".join(takewhile(lambda line: line.startswith("warning: "), str(report).split("\n")))
        shown = re.findall(r"[\w.*]+", first)
        expected = [*(name for name in report.plan.random), *trial.names]
        told = expected and all(any(fnmatchcase(name, pattern) for pattern in shown) for name in expected)
        return "reported" if first.startswith("warning: ") and told else "silent"
    return "refused"


def _equal(source: nn.Module, target: nn.Module, size: int) -> bool:
    channels = next((module.in_channels for module in target.modules() if isinstance(module, nn.Conv2d)), 3)
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, y = source.eval()(images), target.eval()(images)
    return x.shape == y.shape and bool((x - y).norm() <= 1e-4 * x.norm())


# --- networks and their edits ---


def trained(model: nn.Module) -> nn.Module:
    randomise(model)
    return model.eval()


def without(state: State, *patterns: str) -> State:
    return {name: value for name, value in state.items() if not any(re.search(pattern, name) for pattern in patterns)}


def renamed(state: State, *rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> State:
    out = {}
    for name, value in state.items():
        new = name
        for old, word in rules:
            new = re.sub(old, word, new)
        out[new] = value
    return out


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, **options})


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=5, width_mult=0.25)


class Small(nn.Module):
    """Four convolutions with norms, and a head. `norm`: what makes a norm of a width; `names`: of the parts of a block."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, *, bias: bool = False, names: tuple[str, str] = ("conv", "bn")) -> None:
        super().__init__()
        self.parts = []
        for n, (a, b) in enumerate(((3, 8), (8, 12), (12, 16), (16, 24)), 1):
            for word, module in zip(names, (nn.Conv2d(a, b, 3, padding=1, bias=bias), norm(b))):
                setattr(self, f"{word}{n}", module)
                self.parts.append(f"{word}{n}")
        self.fc = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = getattr(self, part)(x)
            x = torch.relu(x) if isinstance(getattr(self, part), nn.Conv2d) is False else x
        return self.fc(x.mean((2, 3)))


def no_norm(_width: int) -> nn.Module:
    return nn.Identity()


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """`how`: fused qkv, separate q k v, or q beside a fused kv."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        sizes = {"fused": {"qkv": 3}, "separate": {"q": 1, "k": 1, "v": 1}, "q and kv": {"q": 1, "kv": 2}}[how]
        for word, times in sizes.items():
            setattr(self, word, nn.Linear(width, times * width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.cat([getattr(self, word)(x) for word in ("qkv", "q", "kv", "k", "v") if hasattr(self, word)], -1)
        q, k, v = parts.chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Tokens(nn.Module):
    """A ViT of nn.Linear and nn.LayerNorm alone."""

    def __init__(self, how: str = "fused", *, norm: Callable[[int], nn.Module] = nn.LayerNorm, scale: bool = False, bias: bool = True, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            parts = {"norm1": norm(24), "attn": Attention(24, how), "norm2": norm(24), "fc1": nn.Linear(24, 48, bias=bias), "fc2": nn.Linear(48, 24, bias=bias)}
            if scale:
                parts |= {"ls1": Scaled(24), "ls2": Scaled(24)}
            self.blocks.append(nn.ModuleDict(parts))
        self.norm = norm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            y = block["attn"](block["norm1"](x))
            x = x + (block["ls1"](y) if "ls1" in block else y)
            y = block["fc2"](torch.relu(block["fc1"](block["norm2"](x))))
            x = x + (block["ls2"](y) if "ls2" in block else y)
        return self.head(self.norm(x).mean(1))


# --- point 1: layers that stay random ---


def _missing(*patterns: str, build: Callable[[], nn.Module] = mobilenet) -> Callable[[Path], Trial]:
    def trial(_folder: Path) -> Trial:
        return Trial(without(trained(build()).state_dict(), *patterns), build())

    return trial


def _between(source: Callable[[], nn.Module], target: Callable[[], nn.Module], *names: str, same: bool = False) -> Callable[[Path], Trial]:
    def trial(_folder: Path) -> Trial:
        ours = trained(source())
        return Trial(ours.state_dict(), target(), same=ours if same else None, names=names)

    return trial


def _new_name(_folder: Path) -> Trial:
    source = trained(Tokens())
    return Trial(renamed(source.state_dict(), (r"blocks\.1\.fc1", "blocks.1.dense")), Tokens(), same=source)


def _oblong(_folder: Path) -> Trial:
    source = trained(vit())
    return Trial(source.state_dict(), vit(img_size=(48, 32)))


# --- point 2: advice ---


def _lora(merged: bool) -> Callable[[Path], Trial]:
    def trial(_folder: Path) -> Trial:
        source = trained(vit())
        state: State = {}
        for name, value in source.state_dict().items():
            if name.endswith("qkv.weight"):
                path = "base_model.model." + name.removesuffix(".weight")
                a, b = torch.randn(2, value.shape[1]) * 0.1, torch.randn(value.shape[0], 2) * 0.1
                state |= {f"{path}.base_layer.weight": value.clone(), f"{path}.lora_A.default.weight": a, f"{path}.lora_B.default.weight": b}
                value += b @ a if merged else 0
            elif name.endswith("qkv.bias"):
                state["base_model.model." + name.replace("qkv", "qkv.base_layer")] = value
            else:
                state["base_model.model." + name] = value
        return Trial(state, vit(), same=source, names=("LoRA",))

    return trial


def _adapter_alone(_folder: Path) -> Trial:
    state = _lora(merged=True)(_folder).source
    return Trial({name.replace(".default", ""): value for name, value in state.items() if "lora_" in name}, vit(), names=("LoRA",))


def _adapter_over_its_base(folder: Path) -> Trial:
    """`adapter`: rank-stabilised LoRA, alpha 2 of rank 2, its classifier trained whole."""
    base, source = vit(), trained(vit())
    state, adapter = {name: value.clone() for name, value in source.state_dict().items()}, State()
    for name, value in source.state_dict().items():
        if name.endswith(("qkv.weight", "fc1.weight")):
            a, b = torch.randn(2, value.shape[1]) * 0.1, torch.randn(value.shape[0], 2) * 0.1
            path = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            value += 2**0.5 * b @ a
        elif name.startswith("head."):
            value.mul_(2)
            adapter[f"base_model.model.{name}"] = value.clone()
    saved(adapter, folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": true, "modules_to_save": ["head"]}')
    return Trial(state, base, same=source, options={"adapter": folder})


def _keras_gray(_folder: Path) -> Trial:
    source = trained(Small())
    state = {}
    for name, value in source.state_dict().items():
        kernel = value.dim() > 1
        state[name[:-6] + "kernel" if kernel else name] = (value.permute(2, 3, 1, 0) if value.dim() == 4 else value.T).contiguous() if kernel else value
    target = Small()
    target.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    wanted = Small()
    wanted.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    wanted.load_state_dict({**source.state_dict(), "conv1.weight": source.state_dict()["conv1.weight"].sum(1, keepdim=True)})
    return Trial(state, target, same=wanted)


def _other_words(_folder: Path) -> Trial:
    """Names that say nothing of order; shapes repeat, so that only the order of registration tells the layers apart."""
    source = trained(Equal(["alpha", "beta", "gamma", "delta"]))
    return Trial(source.state_dict(), Equal(["first", "second", "third", "fourth"]), same=source)


class Equal(nn.Module):
    """Convolutions of one shape, under words."""

    def __init__(self, words: list[str], registered: list[int] | None = None) -> None:
        super().__init__()
        self.words, self.stem, self.fc = words, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        for n in registered or range(len(words)):
            setattr(self, words[n], nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for word in self.words:
            x = torch.relu(getattr(self, word)(x))
        return self.fc(x.mean((2, 3)))


def _masked_autoencoder(_folder: Path) -> Trial:
    """MAE's file: as many layers of a decoder as make 59.8 % of the source used."""
    source = trained(vit(num_classes=0, depth=12))
    state = dict(source.state_dict())
    for name, value in source.state_dict().items():
        if name.startswith("blocks.") and int(name.split(".")[1]) < 8:
            state["decoder_" + name] = torch.randn(*(2 * side for side in value.shape))
    state |= {"decoder_embed.weight": torch.randn(64, 32), "decoder_embed.bias": torch.randn(64)}
    state |= {"decoder_pred.weight": torch.randn(48, 64), "decoder_pred.bias": torch.randn(48)}
    return Trial({"model": state}, vit(num_classes=0, depth=12), same=source)


# --- points 3 and 6: names of the hub, sorted ---


def split_qkv(state: State, names: tuple[str, str, str] = ("query", "key", "value")) -> State:
    out: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            out |= {name.replace("attn.qkv", f"attn.{part}"): each.clone() for part, each in zip(names, value.chunk(3))}
        else:
            out[name] = value
    return out


HF_BLOCK = (
    (r"^blocks\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"attn\.(query|key|value)", r"attention.attention.\1"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"^cls_token", "vit.embeddings.cls_token"),
    (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
)
HF5_BLOCK = (
    (r"^blocks\.(\d+)\.", r"vit.layers.\1."),
    (r"attn\.(q)uery|attn\.(k)ey|attn\.(v)alue", lambda found: f"attention.{found.group(0)[5]}_proj"),
    (r"attn\.proj", "attention.o_proj"),
    *(rule for rule in HF_BLOCK if "attn" not in rule[0] and "mlp" not in rule[0] and "blocks" not in rule[0]),
)
CLIP_BLOCK = (
    (r"^blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"norm(\d)\.", r"layer_norm\1."),
    (r"attn\.(query|key|value)", lambda found: f"self_attn.{found.group(1)[0]}_proj"),
    (r"attn\.proj", "self_attn.out_proj"),
    (r"^cls_token", "vision_model.embeddings.class_embedding"),
    (r"^pos_embed", "vision_model.embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"^norm_pre\.", "vision_model.pre_layrnorm."),
    (r"^norm\.", "vision_model.post_layernorm."),
)
OPENAI_BLOCK = (
    (r"^blocks\.(\d+)\.", r"visual.transformer.resblocks.\1."),
    (r"norm(\d)\.", r"ln_\1."),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^cls_token", "visual.class_embedding"),
    (r"^pos_embed", "visual.positional_embedding"),
    (r"^patch_embed\.proj", "visual.conv1"),
    (r"^norm_pre\.", "visual.ln_pre."),
    (r"^norm\.", "visual.ln_post."),
)


def saved(state: State, folder: Path) -> str:
    """As safetensors, whose names come back sorted."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def _hub(rules: Any, *, flat: bool = False, split: bool = True, more: State | None = None, **options: Any) -> Callable[[Path], Trial]:
    """A ViT of timm under other names, into one of timm."""

    def trial(folder: Path) -> Trial:
        source = trained(vit(**options))
        state = split_qkv(source.state_dict()) if split else dict(source.state_dict())
        state = renamed(state, *rules)
        if flat:
            state = {name: value.squeeze() if re.search(r"class_embedding|position(al)?_embedding", name) else value for name, value in state.items()}
        return Trial(saved({**state, **(more or {})}, folder), vit(**options), same=source)

    return trial


def _dinov2(registers: int) -> Callable[[Path], Trial]:
    rules = (
        *((old, new) for old, new in HF_BLOCK if "norm1" not in old and "norm2" not in old and "mlp" not in old),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"^reg_token", "vit.embeddings.register_tokens"),
        (r"^vit\.", ""),
    )
    options: dict[str, Any] = {"init_values": 1e-5, "num_classes": 0, "reg_tokens": registers, "no_embed_class": registers > 0}
    return _hub(rules, more={"embeddings.mask_token": torch.zeros(1, 32)}, **options)


def _into_torchvision(folder: Path) -> Trial:
    from torchvision.models.vision_transformer import VisionTransformer

    def build() -> nn.Module:
        return VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=5)

    source = trained(build())
    rules = (
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"vit.encoder.layer.\1."),
        (r"ln_1\.", "layernorm_before."),
        (r"ln_2\.", "layernorm_after."),
        (r"self_attention\.in_proj_(\w+)", r"attn.qkv.\1"),
        (r"self_attention\.out_proj", "attention.output.dense"),
        (r"mlp\.0\.|mlp\.linear_1\.", "intermediate.dense."),
        (r"mlp\.3\.|mlp\.linear_2\.", "output.dense."),
        (r"^class_token", "vit.embeddings.cls_token"),
        (r"^encoder\.pos_embedding", "vit.embeddings.position_embeddings"),
        (r"^conv_proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^encoder\.ln\.", "vit.layernorm."),
        (r"^heads\.head\.", "classifier."),
    )
    state = renamed(split_qkv(renamed(source.state_dict(), *rules)), (r"attn\.(query|key|value)", r"attention.attention.\1"))
    return Trial(saved(state, folder), build(), same=source)


def _beit(folder: Path) -> Trial:
    from timm.models.beit import Beit

    def build() -> nn.Module:
        return Beit(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)

    source = trained(build())
    state: State = {}
    for name, value in split_qkv(source.state_dict()).items():
        if "relative_position_index" not in name:
            state[name.replace("q_bias", "query.bias").replace("v_bias", "value.bias").replace("gamma_", "lambda_")] = value
    rules = (
        *((old, new) for old, new in HF_BLOCK if "head" not in old),
        (r"attn\.relative_position_bias_table", "attention.attention.relative_position_bias.relative_position_bias_table"),
        (r"^fc_norm", "vit.pooler.layernorm"),
        (r"^head\.", "classifier."),
        (r"^vit\.", "beit."),
    )
    return Trial(saved(renamed(state, *rules), folder), build(), same=source)


def _swin(folder: Path) -> Trial:
    from timm.models.swin_transformer import SwinTransformer

    def build() -> nn.Module:
        return SwinTransformer(img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5)

    source = trained(build())
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (r"^layers\.(\d+)\.downsample", lambda found: f"swin.encoder.layers.{int(found.group(1)) - 1}.downsample"),
        (r"^layers\.(\d+)\.", r"swin.encoder.layers.\1."),
        (r"norm1\.", "layernorm_before."),
        (r"norm2\.", "layernorm_after."),
        (r"attn\.(query|key|value|relative)", r"attention.self.\1"),
        (r"attn\.proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"^patch_embed\.proj", "swin.embeddings.patch_embeddings.projection"),
        (r"^patch_embed\.norm", "swin.embeddings.norm"),
        (r"^norm\.", "swin.layernorm."),
        (r"^head\.fc\.", "classifier."),
    )
    state = without(split_qkv(source.state_dict()), "relative_position_index", "attn_mask")
    return Trial(saved(renamed(state, *rules), folder), build(), same=source)


# The names of these files are their projects' own: facebookresearch/mae models_vit.py and main_pretrain.py, dino main_dino.py, moco-v3 moco/builder.py, dinov2
# dinov2/models/vision_transformer.py, dinov3 dinov3/models/vision_transformer.py (for what timm makes of them: timm/models/vision_transformer.py, eva.py).


def _official(change: Callable[[State], Any], **options: Any) -> Callable[[Path], Trial]:
    """A ViT of timm, as the project that trained it saves it."""

    def trial(folder: Path) -> Trial:
        source = trained(vit(num_classes=0, **options))
        torch.save(change(dict(source.state_dict())), folder / "checkpoint.pth")
        return Trial(str(folder / "checkpoint.pth"), vit(num_classes=0, **options), same=source)

    return trial


def _prefixed(state: State, prefix: str, *, add: float = 0.0) -> State:
    return {prefix + name: value + add for name, value in state.items()}


def _head_of(prefix: str) -> State:
    return {f"{prefix}mlp.{layer}.{word}": torch.randn(48, 48) if word == "weight" else torch.randn(48) for layer in (0, 2, 4) for word in ("weight", "bias")}


def _dino(state: State) -> Any:
    student = {**_prefixed(state, "module.backbone."), **_head_of("module.head.")}
    return {
        "student": student,
        "teacher": {**_prefixed(state, "backbone.", add=0.1), **_head_of("head.")},
        "optimizer": {"state": {}},
        "epoch": 100,
        "dino_loss": {},
    }


def _moco_v3(state: State) -> Any:
    encoders = {**_prefixed(state, "module.base_encoder."), **_prefixed(state, "module.momentum_encoder.", add=0.1)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": {**encoders, **_head_of("module.predictor.")}}


def _dinov2_official(state: State) -> Any:
    return {"mask_token": torch.zeros(1, 32), **renamed(state, (r"^reg_token", "register_tokens"))}


def _dinov2_chunks(state: State) -> Any:
    """The teacher of a training run: its blocks are kept in chunks for FSDP."""
    backbone = renamed({"mask_token": torch.zeros(1, 32), **state}, (r"^blocks\.(\d)", lambda found: f"blocks.{int(found.group(1)) // 2}.{found.group(1)}"))
    return {"teacher": {**_prefixed(backbone, "backbone."), **_head_of("dino_head.")}}


def _openai_whole(state: State) -> Any:
    visual = renamed(state, *OPENAI_BLOCK)
    visual = {name: value.squeeze() if "embedding" in name else value for name, value in visual.items()}
    text = {name.replace("visual.", ""): value.clone() for name, value in visual.items() if "resblocks" in name}
    text |= {"token_embedding.weight": torch.randn(99, 32), "positional_embedding": torch.randn(7, 32), "text_projection": torch.randn(32, 16)}
    return {**text, **visual, "ln_final.weight": torch.ones(32), "ln_final.bias": torch.ones(32), "logit_scale": torch.tensor(1.0)}


def _dinov3(folder: Path) -> Trial:
    from timm.models.eva import Eva

    def build() -> nn.Module:
        options: dict[str, Any] = {"qkv_bias": False, "init_values": 1e-5, "num_reg_tokens": 4, "use_rot_pos_emb": True, "use_abs_pos_emb": False}
        return Eva(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, rope_type="dinov3", use_fc_norm=False, **options)

    source = trained(build())
    state = renamed(source.state_dict(), (r"^reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    state |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    torch.save(state, folder / "dinov3.pth")
    return Trial(str(folder / "dinov3.pth"), build(), same=source)


def _siglip_pooled(folder: Path) -> Trial:
    """With the pooling head, whose attention has one projection where timm has q beside kv."""
    options: dict[str, Any] = {"class_token": False, "global_pool": "map", "num_classes": 0}
    source = trained(vit(**options))
    state = source.state_dict()
    for word in ("weight", "bias"):
        state[f"attn_pool.in_proj_{word}"] = torch.cat([state.pop(f"attn_pool.{part}.{word}") for part in ("q", "kv")])
    rules = (
        *CLIP_BLOCK,
        (r"^attn_pool\.latent", "vision_model.head.probe"),
        (r"^attn_pool\.proj", "vision_model.head.attention.out_proj"),
        (r"^attn_pool\.in_proj", "vision_model.head.attention.in_proj"),
        (r"^attn_pool\.norm", "vision_model.head.layernorm"),
        (r"^attn_pool\.", "vision_model.head."),
    )
    state = renamed(split_qkv(state), *rules)
    flat = {name: value.squeeze() if "position_embedding" in name else value for name, value in state.items()}
    return Trial(saved(flat, folder), vit(**options), same=source)


def _sorted_head(_folder: Path) -> Trial:
    source = trained(vit())
    target, wanted = vit(num_classes=2), vit(num_classes=2)
    state = source.state_dict()
    wanted.load_state_dict({**state, **{name: state[name][[3, 0]] for name in ("head.weight", "head.bias")}})
    options = {"keep_head": "rows", "source_classes": list("abcde"), "target_classes": ["d", "a"]}
    return Trial(saved(state, _folder), target, same=wanted, options=options)


# --- point 4: parametrisations and other formats ---


def _weight_norm(folder: Path) -> Trial:
    source = trained(Small())
    wrapped = Small()
    wrapped.load_state_dict(source.state_dict())
    for name in ("conv2", "conv3"):
        nn.utils.parametrizations.weight_norm(getattr(wrapped, name))
    wrapped.get_parameter("conv2.parametrizations.weight.original0").data.mul_(1.5)
    return Trial(wrapped.state_dict(), Small(), same=wrapped)


def _old_weight_norm(_folder: Path) -> Trial:
    source = trained(Small())
    state: State = {}
    for name, value in source.state_dict().items():
        if name == "conv2.weight":
            state |= {"conv2.weight_g": value.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), "conv2.weight_v": value * 3}
        else:
            state[name] = value
    return Trial(state, Small(), same=source)


def _spectral_norm(_folder: Path) -> Trial:
    wrapped = trained(Small())
    for name in ("conv2", "conv3"):
        nn.utils.parametrizations.spectral_norm(getattr(wrapped, name))
    wrapped.eval()
    return Trial(wrapped.state_dict(), Small(), same=wrapped)


def _all_spectral(_folder: Path) -> Trial:
    """Every layer under spectral_norm: no tensor is called weight."""
    wrapped = trained(Small(no_norm))
    for name in ("conv1", "conv2", "conv3", "conv4", "fc"):
        nn.utils.parametrizations.spectral_norm(getattr(wrapped, name))
    wrapped.eval()
    return Trial(wrapped.state_dict(), Small(no_norm), same=wrapped)


def _fsdp_flat(_folder: Path) -> Trial:
    return Trial({"_flat_param": torch.randn(1000)}, Small(), names=("FSDP",))


def _numpy(folder: Path) -> Trial:
    import numpy as np

    np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in trained(Small()).state_dict().items()})
    return Trial(str(folder / "weights.npz"), Small(), names=("NumPy",))


def _onnx(folder: Path) -> Trial:
    (folder / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\x80\x01\n\x10torch-onnx-graph")
    return Trial(str(folder / "model.onnx"), Small(), names=("an ONNX",))


def _distributed(folder: Path) -> Trial:
    (folder / ".metadata").write_bytes(b"\x80\x02.")
    (folder / "__0_0.distcp").write_bytes(b"PK")
    return Trial(str(folder), Small(), names=("torch.distributed.checkpoint",))


def _adapter_folder(folder: Path) -> Trial:
    saved(_adapter_alone(folder).source, folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return Trial(str(folder), vit(), names=("LoRA",))


# --- point 5: crashes ---


def _float8(folder: Path) -> Trial:
    state = {name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for name, value in trained(Small()).state_dict().items()}
    torch.save(state, folder / "w.pth")
    return Trial(str(folder / "w.pth"), Small(), names=("float8",))


def _average(folder: Path) -> Trial:
    source = trained(Small())
    other = {name: value + 0.1 if value.is_floating_point() else value for name, value in source.state_dict().items()}
    args = argparse.Namespace(model="small")
    torch.save({"epoch": 3, "arch": "small", "state_dict": source.state_dict(), "state_dict_ema": other, "args": args, "metric": 77.1}, folder / "best.pth.tar")
    return Trial(str(folder / "best.pth.tar"), Small(), same=source, names=("state_dict_ema", "average"))


# --- point 7: false pairs ---


class _Mobile(nn.Module):
    """MobileViT's block: a convolution with its norm, attention, the norm of the tokens; `early` registers that norm before the attention."""

    def __init__(self, words: tuple[str, ...], *, early: bool) -> None:
        super().__init__()
        self.words = words
        stem, conv, norm, blocks, last, head = words
        parts = {stem: nn.Conv2d(3, 24, 4, 4), conv: nn.Conv2d(24, 24, 3, padding=1, bias=False)}
        body: dict[str, nn.Module] = {norm: nn.LayerNorm(24), blocks: nn.ModuleList([_Layer(24, last) for _ in range(2)])}
        for name, module in (parts | (body if early else dict(reversed(body.items()))) | {head: nn.Linear(24, 5)}).items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem, conv, norm, blocks, head = (getattr(self, word) for word in (*self.words[:4], self.words[5]))
        x = conv(stem(x)).flatten(2).transpose(1, 2)
        for block in blocks:
            x = block(x)
        return head(norm(x).mean(1))


class _Layer(nn.Module):
    def __init__(self, width: int, words: str) -> None:
        super().__init__()
        self.words = words.split()
        for word, module in zip(self.words, (nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width))):
            setattr(self, word, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, up, down = (getattr(self, word) for word in self.words)
        return x + down(torch.relu(up(norm(x))))


def _norm_before_its_blocks(_folder: Path) -> Trial:
    ours = ("stem", "local", "norm", "transformer", "norm up down", "head")
    theirs = ("entry", "near", "last", "layers", "before wide narrow", "classifier")
    source, target = trained(_Mobile(ours, early=True)), _Mobile(theirs, early=False)
    words = dict(zip(" ".join(theirs).split(), " ".join(ours).split()))
    truth = {t: ".".join(words.get(part, part) for part in t.split(".")) for t in target.state_dict()}
    return Trial(source.state_dict(), target, same=source, truth=truth)


class _Pair(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(torch.relu(self.a(self.stem(x).flatten(2).mean(2)))))


def _untied(_folder: Path) -> Trial:
    state = renamed(trained(_Pair(tied=False)).state_dict(), (r"^a\.", "alpha."), (r"^b\.", "beta."), (r"^fc", "classifier"), (r"^stem", "entry"))
    return Trial(state, _Pair(tied=True), names=("share one tensor",), options={"assume_order": True})


def _registered_otherwise(_folder: Path) -> Trial:
    """Hashed names of a network that registers its layers in another order than it uses them, and the network itself."""
    source, target = trained(Equal(["one", "two", "three", "four"], [1, 0, 3, 2])), Equal(["one", "two", "three", "four"])
    names = {name: "t" + hashlib.sha1(name.encode()).hexdigest()[:8] for name in source.state_dict()}
    state = {names[name]: value for name, value in source.state_dict().items()}
    return Trial(state, target, same=source, truth=names, options={"source_model": source})


def _mobile_vit(*, early: bool) -> Callable[[Path], Trial]:
    """timm's MobileViT under other words; `early`: its blocks register their last norm before the attention that it follows."""
    words = {
        "stages": "parts", "conv_1x1": "point", "transformer": "layers", "norm1": "ln_a", "norm2": "ln_b", "norm": "final", "attn": "mix", "qkv": "in",
        "proj": "out", "mlp": "ff", "fc1": "up", "fc2": "down", "conv_proj": "back", "conv": "c", "bn": "n", "stem": "entry", "head": "cls", "fc": "lin",
    }  # fmt: skip

    def trial(_folder: Path) -> Trial:
        import timm

        with torch.device("meta"):
            network = timm.create_model("mobilevit_xxs", num_classes=10)
        names = list(network.state_dict())
        if early:
            names = sorted(names, key=lambda name: _place(name, names))
        truth = {name: ".".join(words.get(part, part) for part in name.split(".")) for name in names}
        state = network.state_dict()
        return Trial({truth[name]: state[name] for name in names}, network, truth=truth)

    return trial


def _place(name: str, names: list[str]) -> int:
    """A block's own norm stands where its attention begins."""
    found = re.fullmatch(r"(stages\.\d\.1)\.norm\.\w+", name)
    return names.index(f"{found.group(1)}.transformer.0.norm1.weight") if found else names.index(name)


# --- point 8: options ---


def _wrong(option: str, value: Any, *names: str) -> Callable[[Path], Trial]:
    def trial(_folder: Path) -> Trial:
        return Trial(trained(Small()).state_dict(), Small(), names=(option, *names), options={option: value})

    return trial


def _norm_kind_changed(_folder: Path) -> Trial:
    return Trial(trained(Small()).state_dict(), Small(group_norm))


def rms(width: int) -> nn.Module:
    return nn.RMSNorm(width)


def _vit(**options: Any) -> Callable[[], nn.Module]:
    return partial(vit, **options)


CASES = [
    Case("one convolution missing in MobileNetV2", 1, _missing(r"^features\.2\.conv\.0\.0\.weight"), "reported", "reported"),
    Case("one block of a ViT missing", 1, _missing(r"^blocks\.1\.", build=vit), "reported", "reported"),
    Case("the table of positions missing", 1, _missing(r"^pos_embed", build=vit), "reported", "reported"),
    Case("the class token missing", 1, _missing(r"^cls_token", build=vit), "reported", "reported"),
    Case("the last norm missing", 1, _missing(r"^norm\.", build=vit), "reported", "reported"),
    Case("q beside a fused kv, into a fused qkv", 1, _between(partial(Tokens, "q and kv"), Tokens, same=True), "right", "right"),
    Case("a fused qkv, into q beside a fused kv", 1, _between(Tokens, partial(Tokens, "q and kv"), same=True), "right", "right"),
    Case("a ViT for an oblong input", 1, _oblong, "right", "right"),
    Case("batch norms, into a network without norms", 1, _between(Small, partial(Small, no_norm, bias=True), "bn1.weight"), "reported", "reported"),
    Case("layer scale, into a network without", 1, _between(partial(Tokens, scale=True), Tokens, "blocks.0.ls1.gamma"), "reported", "reported"),
    Case("no layer scale, into a network with it", 1, _between(Tokens, partial(Tokens, scale=True)), "reported", "reported"),
    Case("timm's ViT without layer scale, into one with it", 1, _between(vit, _vit(init_values=1e-5)), "reported", "reported"),
    Case("timm's ViT with layer scale, into one without", 1, _between(_vit(init_values=1e-5), vit, "blocks.0.ls1.gamma"), "reported", "reported"),
    Case("biases, into layers without", 1, _between(Tokens, partial(Tokens, bias=False), "blocks.0.fc1.bias"), "reported", "reported"),
    Case("no biases, into layers with them", 1, _between(partial(Tokens, bias=False), Tokens), "reported", "reported"),
    Case("a ViT without biases of qkv, into one with them", 1, _between(_vit(qkv_bias=False), vit), "reported", "reported"),
    Case("LayerNorm, into RMSNorm", 1, _between(Tokens, partial(Tokens, norm=rms), "blocks.0.norm1.bias"), "reported", "reported"),
    Case("RMSNorm, into LayerNorm", 1, _between(partial(Tokens, norm=rms), Tokens), "reported", "reported"),
    Case("registers that the source does not have", 1, _between(vit, _vit(reg_tokens=2)), "reported", "reported"),
    Case("one layer of a block has another name", 1, _new_name, "followed", "followed"),
    Case("a deeper network than the source", 1, _between(vit, _vit(depth=4)), "reported", "reported"),
    Case("batch norms, into group norms", 2, _norm_kind_changed, "reported", "reported"),
    Case("kernels of Keras, into a network for gray images", 2, _keras_gray, "right", "right"),
    Case("other words, one shape", 2, _other_words, "followed", "followed"),
    Case("a masked autoencoder: 59.8 % of the source used", 2, _masked_autoencoder, "followed", "followed"),
    Case("transformers' ViT", 3, _hub(HF_BLOCK), "right", "right"),
    Case("transformers' DeiT", 3, _hub((*HF_BLOCK, (r"^vit\.", "deit."))), "right", "right"),
    Case("transformers' DINOv2", 3, _dinov2(0), "right", "right"),
    Case("transformers' DINOv2 with registers", 3, _dinov2(2), "right", "right"),
    Case("transformers' BEiT", 3, _beit, "right", "right"),
    Case("transformers' Swin", 3, _swin, "right", "right"),
    Case("transformers' CLIP, vision tower", 3, _hub(CLIP_BLOCK, flat=True, pre_norm=True, num_classes=0), "right", "right"),
    Case(
        "transformers' SigLIP, vision tower",
        3,
        _hub(CLIP_BLOCK, flat=True, class_token=False, global_pool="avg", fc_norm=False, num_classes=0),
        "right",
        "right",
    ),
    Case("OpenAI's CLIP and open_clip, vision tower", 3, _hub(OPENAI_BLOCK, flat=True, split=False, pre_norm=True, num_classes=0), "right", "right"),
    Case("transformers' SigLIP with its pooling head", 3, _siglip_pooled, "right", "right"),
    Case("transformers' ViT, as its modules are called since version 5", 3, _hub(HF5_BLOCK), "right", "right"),
    Case("OpenAI's CLIP, both towers", 3, _official(_openai_whole, pre_norm=True), "right", "right"),
    Case("the official MAE, its encoder", 3, _official(lambda state: {"model": state}), "right", "right"),
    Case("the official DINO, student and teacher", 3, _official(_dino), "followed", "followed"),
    Case("the official MoCo v3, both encoders", 3, _official(_moco_v3), "followed", "followed"),
    Case("the official DINOv2", 3, _official(_dinov2_official, init_values=1.0), "right", "right"),
    Case("the official DINOv2 with registers", 3, _official(_dinov2_official, init_values=1.0, reg_tokens=2, no_embed_class=True), "right", "right"),
    Case("the official DINOv2, a checkpoint of training", 3, _official(_dinov2_chunks, init_values=1.0), "right", "right"),
    Case("the official DINOv3", 3, _dinov3, "right", "right"),
    Case("transformers' ViT, into torchvision's", 3, _into_torchvision, "right", "right"),
    Case("LoRA beside its base", 4, _lora(merged=True), "named", "named"),
    Case("LoRA without its base", 4, _adapter_alone, "named", "named"),
    Case("a folder of a LoRA adapter", 4, _adapter_folder, "named", "named"),
    Case("a LoRA adapter over its base", 4, _adapter_over_its_base, "right", "right"),
    Case("weight_norm, parametrised", 4, _weight_norm, "right", "right"),
    Case("weight_norm, as before torch 2", 4, _old_weight_norm, "right", "right"),
    Case("spectral_norm, parametrised", 4, _spectral_norm, "right", "right"),
    Case("spectral_norm everywhere", 5, _all_spectral, "right", "right"),
    Case("a flat file of FSDP", 5, _fsdp_flat, "named", "named"),
    Case("arrays of NumPy (.npz)", 4, _numpy, "named", "named"),
    Case("ONNX", 4, _onnx, "named", "named"),
    Case("a folder of torch.distributed.checkpoint", 4, _distributed, "named", "named"),
    Case("float8", 5, _float8, "named", "named"),
    Case("timm's training checkpoint with an average of the weights", 5, _average, "named", "named"),
    Case("rows of the head, from a sorted ViT", 6, _sorted_head, "right", "right"),
    Case("a norm registered before the blocks that it follows", 7, _norm_before_its_blocks, "refused", "refused"),
    Case("two values, into one tensor", 7, _untied, "named", "named"),
    Case("MobileViT under other words", 7, _mobile_vit(early=False), "refused", "refused"),
    Case("MobileViT under other words, a norm registered too early", 7, _mobile_vit(early=True), "refused", "refused"),
    Case("registered in another order than used, network given", 7, _registered_otherwise, "right", "right"),
    Case("on_ambiguous misspelt", 8, _wrong("on_ambiguous", "eror", "error"), "named", "named"),
    Case("keep_head that is no choice", 8, _wrong("keep_head", "maybe", "rows"), "named", "named"),
    Case("fill that is no choice", 8, _wrong("fill", {"conv_bias": "ones"}, "conv_bias", "zero"), "named", "named"),
    Case("ignore as one text", 8, _wrong("ignore", "decoder.*", "['decoder.*']"), "named", "named"),
]


def results(only: str = "", point: int | None = None) -> Iterator[tuple[Case, str]]:
    for case in CASES:
        if only in case.name and point in (None, case.point):
            with tempfile.TemporaryDirectory() as folder:
                yield case, outcome(case, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--point", type=int, help="cases of this point of the issue, by its number")
    options = parser.parse_args()
    found = list(results(options.only, options.point))
    for case, now in found:
        print(f"{case.point:>2}  {case.name:62s} wanted {case.wanted:9s} {'as before' if now == case.today else 'before ' + case.today}: {now}")
    print(f"{sum(now == case.wanted for case, now in found)} of {len(found)} as wanted")
    return int(any(now != case.today for case, now in found))


if __name__ == "__main__":
    sys.exit(main())
