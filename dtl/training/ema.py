"""An exponential moving average of the weights (Polyak and Juditsky 1992; as used by Tarvainen and Valpola 2017, arXiv 1703.01780)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dtl.errors import UserError
from dtl.models.strict_load import check_tensors


class ExponentialMovingAverage:
    """Averages the parameters of `module` that require a gradient, and the running statistics of its normalisation layers.

    A frozen parameter has no average, so it stays what it is, bit for bit; so do statistics that do not move. Other buffers are
    copied. (Statistics are averaged too, as torchvision's and timm's averages do: averaged weights produce activations that the
    latest statistics do not describe.) Build it after freezing, and anew for each phase.

    With `warm_up` the decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, *, decay: float, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema is {decay}; it is a decay, from 0 to below 1")
        self.decay, self.warm_up, self.num_updates = decay, warm_up, 0
        averaged, copied = _names(module)
        tensors = _tensors(module)
        # The module's own tensors, which every loader and optimizer changes in place: no walk over the modules in each step.
        self._live = {name: tensors[name] for name in (*averaged, *copied)}
        self._kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._averaged, self._copied = averaged, copied
        self._buffers = [name for name in self._kept if not isinstance(tensors[name], nn.Parameter)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average: once after each optimizer step. Never waits for the device."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warm_up else self.decay
        live, kept = self._live, self._kept
        if self._averaged:
            torch._foreach_lerp_([kept[n] for n in self._averaged], [live[n].detach() for n in self._averaged], 1 - decay)
        if self._copied:
            torch._foreach_copy_([kept[n] for n in self._copied], [live[n] for n in self._copied])
        self.num_updates += 1

    def buffers(self) -> list[Tensor]:
        """The averaged statistics and copied buffers, in the same order on every rank: ranks see other images, and differ in them."""
        return [self._kept[name] for name in self._buffers]

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `num_updates`: name in the module -> average."""
        return dict(self._kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Go on from `state_tensors()` of an average of the same parameters."""
        check_tensors(self._kept, tensors, "the saved moving average is of other weights")
        for name, kept in self._kept.items():
            kept.copy_(tensors[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Make the average the weights of `module`."""
        tensors = _tensors(module)
        for name, kept in self._kept.items():
            tensors[name].copy_(kept)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """`module` has the averaged weights inside the block, and its own again after it, whatever happens there."""
        tensors = _tensors(module)
        # The copy is made before anything changes: running out of memory here leaves the module as it is.
        own = {name: tensors[name].detach().clone() for name in self._kept}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    tensors[name].copy_(tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of what is averaged, and of the saved buffers that are copied."""
    averaged = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    saved = module.state_dict(keep_vars=True).keys()
    norms = {prefix for prefix, child in module.named_modules() if isinstance(child, _NormBase)}
    copied: list[str] = []
    for name, buffer in module.named_buffers():
        if name not in saved:
            continue
        is_statistic = name.rpartition(".")[0] in norms and buffer.is_floating_point()
        (averaged if is_statistic else copied).append(name)
    return averaged, copied
