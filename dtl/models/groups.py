"""A network's parameters in layer groups, from the input to the head: the unit of `last:N` and of layer-wise learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from dtl.models.init import is_norm
from dtl.models.network import Network

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


@dataclass
class _Group:
    names: list[str] = field(default_factory=list)
    has_weights: bool = False  # a convolution, a linear layer or a block is in it; norms alone wait for one


def layer_groups(network: Network) -> list[list[str]]:
    """Parameter names in groups, input first, head last; every parameter in exactly one.

    A block (residual block, transformer layer, Fire or Inception module) is one group, and so is a convolution or linear layer
    outside blocks. A norm belongs to the layer before it. The last group is the head with its auxiliary branches.
    """
    head = head_parameters(network)
    groups: list[_Group] = []
    for name, starts, has_weights in _grouped(network):
        if name in head:
            continue
        if not groups or (starts and groups[-1].has_weights):
            groups.append(_Group())
        groups[-1].names.append(name)
        groups[-1].has_weights |= has_weights
    ordered = [name for name, _ in network.module.named_parameters() if name in head]
    return [*(group.names for group in groups), ordered]


def head_parameters(network: Network) -> frozenset[str]:
    """Names of the parameters of the main head and of the whole auxiliary branches (Inception's AuxLogits with its convolutions)."""
    main, *auxiliary = network.heads
    prefixes = [main + "."]
    for name in auxiliary:
        branch = name
        while (parent := branch.rpartition(".")[0]) and not main.startswith(parent + "."):
            branch = parent
        prefixes.append(branch + ".")
    return frozenset(name for name, _ in network.module.named_parameters() if name.startswith(tuple(prefixes)))


def block_names(network: Network) -> list[str]:
    """Dotted names of the blocks in order: the composite modules of two weight layers or more that are one layer group each."""
    head = head_parameters(network)
    return [
        name
        for name, module, expanded in _units(network)
        if not expanded and _is_block(module) and not any(_join(name, key) in head for key, _ in module.named_parameters())
    ]


def _grouped(network: Network) -> Iterator[tuple[str, bool, bool]]:
    """(parameter name, whether it may start a group, whether it belongs to a weight layer), in order."""
    known = {name for name, _ in network.module.named_parameters()}  # a shared parameter once, under its first name
    for name, module, expanded in _units(network):
        own = [_join(name, key) for key, _ in module.named_parameters(recurse=not expanded)]
        weights = not expanded and not is_norm(module)
        for i, full in enumerate(key for key in own if key in known):
            yield full, weights and i == 0, weights


def _units(network: Network) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, expanded): what groups are made of, depth first; an expanded module comes before its parts, for its own parameters."""

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, bool]]:
        prefix = name + "." if name else ""
        expanded = _expands(module) or any(head.startswith(prefix) for head in network.heads)
        yield name, module, expanded
        for key, child in module.named_children():
            if expanded:
                yield from walk(child, prefix + key)

    return walk(network.module, "")


def _expands(module: nn.Module) -> bool:
    """True if the module is split into its parts: a container of several layers, or a stage that holds a container of equal blocks."""
    if isinstance(module, _CONTAINERS):
        return _num_weight_layers(module) >= 2
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            kinds = [type(block) for block in child.children() if _is_block(block)]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and _num_weight_layers(module) >= 2


def _num_weight_layers(module: nn.Module) -> int:
    return sum(isinstance(layer, _WEIGHT_LAYERS) for layer in module.modules())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
