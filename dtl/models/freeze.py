"""What is trained and what is frozen: chosen by name, kept whatever `train()` is called with, and checked by a checksum.

A frozen parameter gets no gradient. A frozen module stays in eval mode whatever `train()` says, so that running statistics do not
drift and dropout draws nothing (pytorch#86590: "people don't know that their feature extractor is not entirely frozen").
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

from dtl.config.models import ImageSize
from dtl.errors import UserError
from dtl.files import sha256_of_tensors
from dtl.models.groups import head_parameters, layer_groups
from dtl.models.meta import meta_copy
from dtl.models.network import Network, forward_logits, image_shape
from dtl.models.norms import norms_alone


def select(network: Network, train: str | Sequence[str]) -> frozenset[str]:
    """The names of the parameters that `train` means: "all", "head", "last:N" (layer groups, the head is the first), or patterns.

    A pattern is matched against whole parameter names as in a shell (`layer4.*`, `*.bias`); one that hits nothing is an error.
    A list is the union of its items, each of any of these kinds.
    """
    names = [name for name, _ in network.module.named_parameters()]
    if train == "all":
        return frozenset(names)
    if train == "head":
        return head_parameters(network)
    if isinstance(train, str) and train.startswith("last:"):
        return _last(network, train)
    if isinstance(train, str):
        return frozenset(_matching(train, names))
    if not train:
        raise UserError("train: an empty list trains nothing; give all, head, last:N or patterns of parameter names")
    return frozenset().union(*(select(network, item) for item in train))


def freeze(module: nn.Module, trainable: Collection[str], *, freeze_norm: bool = True, frozen_statistics: bool = False) -> list[str]:
    """Make exactly the parameters in `trainable` (names in `module`) require a gradient, and fix the modes of the rest.

    Call it on the bare module, before the DDP wrap. It may be called again with other names.
    With `freeze_norm=False` the running statistics of frozen norms keep adapting; with `frozen_statistics` those of no norm do. Returns what should be
    logged: the names of modules with both trained and frozen parameters of their own, which stay in eval mode too.
    """
    known = dict(module.named_parameters())
    unknown = sorted(set(trainable) - known.keys())
    assert not unknown, f"not parameters of this module: {unknown[:3]}"
    for name, parameter in known.items():
        parameter.requires_grad_(name in trainable)
    kept, mixed = _modules_in_eval(module, freeze_norm=freeze_norm, frozen_statistics=frozen_statistics)
    for name, part in module.named_modules():
        part.__dict__.pop("train", None)
        if name in kept:
            part.__dict__["train"] = _StaysInEval(part)
    return mixed


def set_train_mode(module: nn.Module) -> None:
    """Train mode for what is trained, eval mode for what `freeze` has frozen. The same as `module.train()`, which is safe too."""
    module.train()


def frozen_names(module: nn.Module, *, freeze_norm: bool = True, frozen_statistics: bool = False) -> tuple[str, ...]:
    """What must not change while the module is frozen as it is: frozen parameters, and the buffers of modules kept in eval mode; sorted."""
    names = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    kept, _ = _modules_in_eval(module, freeze_norm=freeze_norm, frozen_statistics=frozen_statistics)
    for name in kept:
        part = module.get_submodule(name)
        names.update(f"{name}.{key}" if name else key for key, _ in part.named_buffers(recurse=False))
    return tuple(sorted(names))


def checksum(module: nn.Module, names: Iterable[str]) -> str:
    """SHA-256 over the named parameters and buffers (`dtl.files.sha256_of_tensors`)."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    return sha256_of_tensors({name: tensors[name] for name in names})


def unused_parameters(network: Network, trainable: Collection[str], *, auxiliary: bool = True, image_size: ImageSize | None = None) -> frozenset[str]:
    """The names in `trainable` that would get no gradient, for DDP, which waits for each of its parameters.

    `auxiliary`: the auxiliary heads are in the loss. Found by one forward and backward pass of two images, by a copy, once for
    each set of layers that is trained with a head of one size: the answer depends on nothing that changes between steps.
    """
    size = image_size or network.preprocessing.image_size
    question = (id(network.module), frozenset(trainable), network.num_outputs, size, auxiliary)
    if question not in network.without_gradient:
        with norms_alone():
            network.without_gradient[question] = _unused(network, trainable, size, auxiliary)
    return network.without_gradient[question]


def _unused(network: Network, trainable: Collection[str], size: ImageSize, auxiliary: bool) -> frozenset[str]:
    # Not on the meta device: two images cost less than to import what that needs (PyTorch's compiler: seconds).
    device, shape = next(network.module.parameters()).device, image_shape(network.module, 2, size)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return _without_gradient(copy.deepcopy(network.module), trainable, torch.zeros(shape, device=device), auxiliary)
    except torch.OutOfMemoryError:  # of a network that is trained in 16 bits, one image at a time
        return _without_gradient(meta_copy(network.module), trainable, torch.empty(shape, device="meta"), auxiliary)


def _without_gradient(module: nn.Module, trainable: Collection[str], images: torch.Tensor, auxiliary: bool) -> frozenset[str]:
    """Trains nothing and may spoil `module`'s running statistics: give it a copy."""
    freeze(module, trainable)
    set_train_mode(module)
    logits, others = forward_logits(module, images)
    loss = logits.sum() + sum(other.sum() for other in others if auxiliary)
    wanted = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with torch.autograd.set_detect_anomaly(False):  # run.debug looks for NaN in the values, and on the meta device there are none
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(wanted, gradients) if gradient is None)


class _StaysInEval:
    """Stands in for one module's `train` method: the module itself stays in eval mode, its children decide for themselves.

    An object that refers to its module, not a closure and not a bound method, so that deepcopy and pickle carry it along.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        self.module.training = False
        for child in self.module.children():
            child.train(mode)
        return self.module


def _modules_in_eval(root: nn.Module, *, freeze_norm: bool, frozen_statistics: bool) -> tuple[set[str], list[str]]:
    """Names of the modules that stay in eval mode, and those of them with trained and frozen parameters of their own."""
    kept: set[str] = set()
    mixed: list[str] = []

    def visit(module: nn.Module, name: str, parent_trains: bool) -> None:
        parameters = list(module.parameters())
        own = list(module.parameters(recurse=False))
        trains = all(parameter.requires_grad for parameter in parameters) if parameters else parent_trains
        if own and any(parameter.requires_grad for parameter in own) and not all(parameter.requires_grad for parameter in own):
            mixed.append(name)
        # The root's own mode only decides what its forward does beside its parts: whether auxiliary heads run, which must be
        # trained together with the main one.
        stays = not any(parameter.requires_grad for parameter in parameters) if module is root else not trains
        if frozen_statistics if _has_statistics(module) and (frozen_statistics or not freeze_norm) else stays:
            kept.add(name)
        for key, child in module.named_children():
            visit(child, f"{name}.{key}" if name else key, trains)

    visit(root, "", True)
    return kept, mixed


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _last(network: Network, train: str) -> frozenset[str]:
    groups = layer_groups(network)
    text = train.removeprefix("last:").strip()
    if not text.isdecimal() or not 1 <= int(text) <= len(groups):
        raise UserError(f"train: {train!r} must be last:N with N from 1 (the head) to {len(groups)}, the layer groups of {network.name}")
    return frozenset(name for group in groups[-int(text) :] for name in group)


def _matching(pattern: str, names: list[str]) -> list[str]:
    hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if hits:
        return hits
    if any(name.startswith(pattern + ".") for name in names):
        near = [pattern + ".*"]
    else:
        near = difflib.get_close_matches(pattern, ["all", "head", "last:1", *names, *_prefixes(names)], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; names look like {names[0]} and {names[-1]}"
    raise UserError(f"train: the pattern {pattern!r} matches no parameter{hint}")


def _prefixes(names: list[str]) -> list[str]:
    parts = {name.rsplit(".", depth)[0] + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    return sorted(parts)
