"""Random small networks, random edits of them, and the true correspondence of their tensors, by construction.

A network is a plan of layers, each with an identity that survives every edit that leaves the layer what it is. Names come from
the plan, so that an inserted block never takes another block's name. At the end two fixed ones: a table of relative positions, and tied weights.
"""

from __future__ import annotations

import copy
import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Layer:
    name: str
    kind: str  # conv, bn, linear, ln
    sizes: tuple[int, ...]
    identity: int


@dataclass
class Block:
    name: str
    layers: list[Layer]


@dataclass
class NetworkPlan:
    """Stages of blocks between a stem and a head. `order`: a seed that shuffles the registration, None for the natural one."""

    stem: list[Layer]
    stages: list[list[Block]]
    head: Layer
    order: int | None = None
    counter: int = field(default=0)


class _Block(nn.Module):
    def __init__(self, layers: list[Layer], shuffle: random.Random | None) -> None:
        super().__init__()
        self.steps = [layer.name for layer in layers]
        for layer in _shuffled(layers, shuffle):
            self.add_module(layer.name, _module(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for name in self.steps:
            y = getattr(self, name)(y)
        return x + y if y.shape == x.shape else y


class RandomNetwork(nn.Module):
    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        shuffle = None if plan.order is None else random.Random(plan.order)
        self.steps: list[str] = []
        parts: list[tuple[str, nn.Module]] = [(layer.name, _module(layer)) for layer in plan.stem]
        for number, blocks in enumerate(plan.stages):
            stage = nn.Module()
            for block in _shuffled(blocks, shuffle):
                stage.add_module(block.name, _Block(block.layers, shuffle))
            parts.append((f"stage{number}", stage))
        self.steps += [layer.name for layer in plan.stem]
        self.stages = [[f"stage{n}.{block.name}" for block in blocks] for n, blocks in enumerate(plan.stages)]
        for name, module in _shuffled([*parts, (plan.head.name, _module(plan.head))], shuffle):
            self.add_module(name, module)
        self.head_name = plan.head.name
        self.tokens = plan.stem[0].kind == "linear"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in [*self.steps, *(path for stage in self.stages for path in stage)]:
            x = self.get_submodule(name)(x)
        return self.get_submodule(self.head_name)(x if self.tokens else x.mean((2, 3)))


def _shuffled(items: list[Any], shuffle: random.Random | None) -> list[Any]:
    items = list(items)
    if shuffle is not None:
        shuffle.shuffle(items)
    return items


def _module(layer: Layer) -> nn.Module:
    if layer.kind == "conv":
        fan_in, out, kernel = layer.sizes
        return nn.Conv2d(fan_in, out, kernel, padding=kernel // 2, bias=False)
    if layer.kind == "bn":
        return nn.BatchNorm2d(*layer.sizes)
    if layer.kind == "ln":
        return nn.LayerNorm(*layer.sizes)
    return nn.Linear(*layer.sizes)


def identities(plan: NetworkPlan) -> dict[str, int]:
    """Path of each layer -> its identity."""
    found = {layer.name: layer.identity for layer in (*plan.stem, plan.head)}
    for number, blocks in enumerate(plan.stages):
        for block in blocks:
            found.update({f"stage{number}.{block.name}.{layer.name}": layer.identity for layer in block.layers})
    return found


def random_plan(rng: random.Random) -> NetworkPlan:
    plan = NetworkPlan([], [], Layer("fc", "linear", (1, 1), 0), counter=1)
    widths = [rng.choice((8, 12, 16)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        return _tokens(plan, rng, widths[0])
    plan.stem = [_layer(plan, "conv1", "conv", (3, widths[0], 3)), _layer(plan, "bn1", "bn", (widths[0],))]
    current = widths[0]
    for width in widths:
        bottleneck = rng.random() < 0.4
        blocks = []
        for number in range(rng.randint(1, 4)):
            blocks.append(_conv_block(plan, f"block{number}", current, width, bottleneck))
            current = width
        plan.stages.append(blocks)
    plan.head = _layer(plan, "fc", "linear", (current, 10))
    return plan


def _tokens(plan: NetworkPlan, rng: random.Random, width: int) -> NetworkPlan:
    plan.stem = [_layer(plan, "embed", "linear", (20, width))]
    blocks = []
    for number in range(rng.randint(2, 5)):
        layers = [("norm1", "ln", (width,)), ("qkv", "linear", (width, 3 * width)), ("proj", "linear", (3 * width, width))]
        layers += [("norm2", "ln", (width,)), ("fc1", "linear", (width, 4 * width)), ("fc2", "linear", (4 * width, width))]
        blocks.append(Block(f"block{number}", [_layer(plan, *layer) for layer in layers]))
    plan.stages = [blocks]
    plan.head = _layer(plan, "fc", "linear", (width, 10))
    return plan


def _layer(plan: NetworkPlan, name: str, kind: str, sizes: tuple[int, ...]) -> Layer:
    plan.counter += 1
    return Layer(name, kind, sizes, plan.counter)


def _conv_block(plan: NetworkPlan, name: str, fan_in: int, width: int, bottleneck: bool) -> Block:
    shapes = [(fan_in, 4, 1), (4, 4, 3), (4, width, 1)] if bottleneck else [(fan_in, width, 3), (width, width, 3)]
    layers = []
    for number, sizes in enumerate(shapes, 1):
        layers.append(_layer(plan, f"conv{number}", "conv", sizes))
        layers.append(_layer(plan, f"bn{number}", "bn", (sizes[1],)))
    return Block(name, layers)


# --- edits ---


def edit(plan: NetworkPlan, what: str, rng: random.Random) -> NetworkPlan:
    plan = copy.deepcopy(plan)
    if what == "insert":
        blocks = rng.choice(plan.stages)
        # Behind the first block of a stage all blocks have the same shapes.
        model = copy.deepcopy(blocks[-1])
        if _output(model) == _input(model) or len(blocks) > 1:
            for layer in model.layers:
                plan.counter += 1
                layer.identity = plan.counter
            model.name = f"extra{plan.counter}"
            blocks.insert(rng.randint(1, len(blocks)) if _input(blocks[0]) != _output(blocks[0]) else rng.randint(0, len(blocks)), model)
    elif what == "delete":
        blocks = rng.choice(plan.stages)
        removable = [block for block in blocks if _input(block) == _output(block)]
        if removable and len(blocks) > 1:
            blocks.remove(rng.choice(removable))
    elif what == "width":
        _change_width(plan, rng)
    elif what == "classes":
        plan.head = _layer(plan, plan.head.name, "linear", (plan.head.sizes[0], rng.choice((2, 5, 37))))
    elif what == "permute":
        plan.order = rng.randrange(1 << 30)
    else:
        raise AssertionError(what)
    return plan


def _input(block: Block) -> int:
    return next(layer.sizes[0] for layer in block.layers if layer.kind in ("conv", "linear"))


def _output(block: Block) -> int:
    return next(layer.sizes[1] for layer in reversed(block.layers) if layer.kind in ("conv", "linear"))


def _change_width(plan: NetworkPlan, rng: random.Random) -> None:
    """Another inner width for one block: its first layer's outputs, what normalises them, the second layer's inputs."""
    block = rng.choice(rng.choice(plan.stages))
    inner = [layer for layer in block.layers if layer.kind in ("conv", "linear")]
    first, second = inner[-2], inner[-1]
    new = first.sizes[1] + rng.choice((2, 6))
    between = [layer for layer in block.layers[block.layers.index(first) + 1 : block.layers.index(second)] if layer.kind in ("bn", "ln")]
    plan.counter += 3
    first.sizes, first.identity = (first.sizes[0], new, *first.sizes[2:]), plan.counter
    second.sizes, second.identity = (new, *second.sizes[1:]), plan.counter - 1
    for layer in between:
        layer.sizes, layer.identity = (new,), plan.counter - 2


# --- names ---

_OTHER_WORDS = {"stage": "part", "block": "unit", "conv": "c", "bn": "norm", "fc": "classifier", "proj": "out", "embed": "stem"}


def rename(name: str, how: str) -> str:
    if how == "keep":
        return name
    if how == "hash":
        return "t" + hashlib.sha1(name.encode()).hexdigest()[:10]
    if how == "hash parts":
        *path, word = name.split(".")
        return ".".join([*("m" + hashlib.sha1(part.encode()).hexdigest()[:6] for part in path), word])
    if how == "wrap":
        return "module.net." + name
    assert how == "words", how
    for old, new in _OTHER_WORDS.items():
        name = name.replace(old, new)
    return name


def truth(source: NetworkPlan, target: NetworkPlan, how: str) -> dict[str, str]:
    """Target tensor -> source tensor for every layer that both have."""
    ours = {identity: path for path, identity in identities(source).items()}
    state = RandomNetwork(source).state_dict()
    found = {}
    for path, identity in identities(target).items():
        if identity in ours:
            for name in state:
                if name.rpartition(".")[0] == ours[identity]:
                    found[f"{path}.{name.rpartition('.')[2]}"] = rename(name, how)
    return found


class Window(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * size - 1) ** 2, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(self.qkv(x)[:, :8]))


class Axes(nn.Module):
    """An attention layer with an embedding of the distances along each axis, [2 * size - 1, channels], as SAM and BoTNet have them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.randn(2 * size - 1, 4)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(self.qkv(x)[:, :8]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.b(self.a(x)))


class Tokens(nn.Module):
    """A small ViT: patches, class token, positions, one block, head; [B, 3, S, S] -> [B, 5]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 12, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // 8) ** 2, 12))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head((x + self.fc2(torch.relu(self.fc1(self.norm(x)))))[:, 0])


class TwoConvolutions(nn.Module):
    """Convolution, norm, convolution, norm, head: [B, 3, H, W] -> [B, classes]."""

    def __init__(self, *, classes: int = 4, channels: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))
