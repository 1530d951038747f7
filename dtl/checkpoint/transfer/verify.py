"""Does the target compute what the source computes? A right map is not an equal function: strides, paddings, eps may differ.

Both networks get random values (the plan applied between them) and the same images; outputs of paired layers are compared in
the order in which the target runs them. The pretrained values are not needed for this.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtl.checkpoint.transfer.adapt import apply_transform
from dtl.checkpoint.transfer.plan import TransferPlan
from dtl.config.models import ImageSize, sides
from dtl.errors import printable

_SETTINGS = ("eps", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode")
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """`compared` layers, of which `equal` have equal outputs (relative difference under 1e-3).

    `first_divergence`: the first layer, in the target's order of execution, whose output differs, with the difference.
    `settings`: paired layers that are set up differently. `output_difference`: of the networks' outputs, None where the
    head is another.
    """

    compared: int
    equal: int
    first_divergence: str | None
    settings: tuple[str, ...]
    output_difference: float | None

    def __str__(self) -> str:
        lines = [f"verify: {self.equal} of {self.compared} paired layers have equal outputs"]
        if self.output_difference is not None:
            lines.append(f"  outputs differ by {self.output_difference:.2g} (relative)")
        if self.first_divergence:
            lines.append(f"  first divergence: {self.first_divergence}")
        lines += [f"  different setting: {line}" for line in self.settings[:12]]
        if len(self.settings) > 12:
            lines.append(f"  and {len(self.settings) - 12} more")
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "settings": list(self.settings)}


def verify_plan(plan: TransferPlan, source_model: nn.Module, target_model: nn.Module, *, image_size: ImageSize = 224) -> Verification:
    """Compare both networks under the plan. Neither is changed; both must have memory (not on the meta device)."""
    source, target = copy.deepcopy(source_model).eval(), copy.deepcopy(target_model).eval()
    randomise(source)
    own = _by_plan_names(plan, source)
    state = target.state_dict()
    with torch.no_grad():
        for outcome in plan.outcomes:
            if outcome.target is None or outcome.outcome == "filled":
                if outcome.target is not None:
                    state[outcome.target].zero_()
                continue
            if outcome.outcome not in ("loaded", "adapted"):
                continue
            if outcome.transform == "rows":
                continue
            shape = tuple(state[outcome.target].shape)
            state[outcome.target].copy_(apply_transform(outcome.transform, [own[key] for key in outcome.sources], shape))
    pairs = _paired_modules(plan, source, target, own)
    channels = next((m.in_channels for m in source.modules() if isinstance(m, nn.Conv2d)), 3)
    images = torch.randn(2, channels, *sides(image_size), generator=torch.Generator().manual_seed(0))
    # Of norms only the settings are compared: some hold their activation. What they do shows in the next layer's output.
    partner = {b: a for a, b in pairs if _weight_of(source, a).dim() > 1}
    ours, _, ours_out = _activations(source, list(partner.values()), images)
    theirs, order, theirs_out = _activations(target, list(partner), _as_input(images, target))
    differences = [(name, _difference(ours[partner[name]], theirs[name])) for name in order if partner[name] in ours]
    diverged = [(name, value) for name, value in differences if value is None or value > TOLERANCE]
    return Verification(
        compared=len(differences),
        equal=len(differences) - len(diverged),
        first_divergence=_describe(diverged[0], partner) if diverged else None,
        settings=tuple(_settings(source, target, pairs)),
        output_difference=None if any(o.head and o.outcome == "fresh" for o in plan.outcomes) else _difference(ours_out, theirs_out),
    )


def randomise(module: nn.Module, *, seed: int = 0) -> None:
    """Random values for every floating tensor, statistics included, at a scale that keeps activations alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(noise.abs() + 0.5)
            elif value.dim() == 1 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            else:
                value.copy_(noise * (max(1, value.numel() // max(1, len(value))) ** -0.5 if value.dim() > 1 else 0.2))


def _by_plan_names(plan: TransferPlan, source: nn.Module) -> dict[str, torch.Tensor]:
    """The source network's tensors under the names that the plan (the file) gives them."""
    from dtl.checkpoint.transfer.plan import names_in_network

    names = names_in_network(plan.source_specs, source)
    state = source.state_dict()
    return {name: state[own] for name, own in names.items()}


def _paired_modules(plan: TransferPlan, source: nn.Module, target: nn.Module, own: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    where = {value.data_ptr(): name for name, value in source.state_dict().items()}
    modules, theirs = dict(source.named_modules()), dict(target.named_modules())
    pairs = {}
    for outcome in plan.outcomes:
        name = outcome.target
        if name is None or not name.endswith(".weight") or len(outcome.sources) != 1 or outcome.outcome not in ("loaded", "adapted"):
            continue
        a, b = where[own[outcome.sources[0]].data_ptr()].rpartition(".")[0], name.rpartition(".")[0]
        if a in modules and b in theirs and not isinstance(theirs[b], nn.MultiheadAttention):
            pairs[b] = a
    return [(a, b) for b, a in pairs.items()]


def _weight_of(module: nn.Module, path: str) -> torch.Tensor:
    weight = module.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _activations(module: nn.Module, names: list[str], images: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[str], torch.Tensor]:
    """(output of each named module at its first call, names in the order of those calls, the network's output)."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found.setdefault(name, output.detach().clone())

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        with torch.no_grad():
            output = module(images)
    finally:
        for handle in handles:
            handle.remove()
    return found, list(found), output if isinstance(output, torch.Tensor) else output[0]


def _as_input(images: torch.Tensor, target: nn.Module) -> torch.Tensor:
    channels = next((m.in_channels for m in target.modules() if isinstance(m, nn.Conv2d)), images.shape[1])
    return images if channels == images.shape[1] else images[:, [0] * channels]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Relative difference, size-1 dimensions aside; None where shapes or layouts cannot be compared."""
    if a.numel() != b.numel():
        return None
    a, b = (x.squeeze() for x in (a, b))
    if a.shape != b.shape:
        return None
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


def _describe(diverged: tuple[str, float | None], partner: dict[str, str]) -> str:
    name, value = diverged
    how = "the shapes of their outputs differ" if value is None else f"relative difference {value:.2g}"
    return f"{name} (in the source: {partner[name]}): {how}"


def _settings(source: nn.Module, target: nn.Module, pairs: list[tuple[str, str]]) -> list[str]:
    lines = []
    for ours, theirs in pairs:
        a, b = source.get_submodule(ours), target.get_submodule(theirs)
        for setting in _SETTINGS:
            x, y = getattr(a, setting, None), getattr(b, setting, None)
            if x is not None and y is not None and x != y:
                lines.append(f"{theirs}: {setting} {y} here, {x} in the source ({ours})")
    return lines
