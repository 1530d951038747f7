"""`run.deterministic`: kernels that give the same bits each time, and what of a machine those bits depend on.

Without it a GPU run is not bit-identical when it is repeated or resumed: cuDNN chooses kernels by their timing, and some kernels add in the order
in which their threads happen to end. On CPUs a run is bit-identical either way.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dtl.errors import UserError
from dtl.text import counted, some

_CUBLAS, _CUBLAS_VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# NCCL chooses them by message size and by what it finds of the network, which may be another one after a restart. Each adds in an order of its own.
_FIXED = {_CUBLAS: _CUBLAS_VALUES[0], "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
_WARNING = r"(\S+) does not have a deterministic implementation"


@contextmanager
def deterministic_kernels(wanted: bool, *, strict: bool = True) -> Iterator[None]:
    """While it lasts, if `wanted`: deterministic kernels wherever PyTorch has them. Enter it before CUDA and NCCL start, which read the environment then.

    `strict`: UserError where it cannot hold any more. Child processes inherit the variables. What the user has set of NCCL stays.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(_CUBLAS)
    if strict and given is not None and given not in _CUBLAS_VALUES:
        raise UserError(f"run.deterministic needs {_CUBLAS}={_CUBLAS_VALUES[0]}, but it is {given!r}; unset it")
    if strict and given is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UserError(f"run.deterministic: this process has used CUDA already; set {_CUBLAS}={_CUBLAS_VALUES[0]} before it starts, or train in a new process")
    missing = [name for name in _FIXED if name not in os.environ]
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), cudnn.benchmark, cudnn.deterministic
    filled = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ |= {name: _FIXED[name] for name in missing}
    # Warn only: one operator without such a kernel, which is named before the first step, is no reason to refuse all others theirs.
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all that is read here has been written before
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_WARNING)  # a line of dtl's names these operators, see `name_operators`
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic = before[2:]
        memory.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def operators_noted(found: list[str]) -> Iterator[None]:
    """Appends the operators without a deterministic kernel that run inside, under torch's names, once each; does not print torch's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if match := re.match(_WARNING, str(warning.message)):
            if match[1] not in found:
                found.append(match[1])
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def name_operators(operators: Sequence[str], phase: str, device: str) -> list[str]:
    """The line about operators that have no deterministic kernel. From here on torch warns of others, should there be any."""
    warnings.filterwarnings("default", message=_WARNING)
    for name in operators:
        warnings.filterwarnings("ignore", message=f"{re.escape(name)} does not have a deterministic implementation")
    if not operators:
        return []
    return [
        f"phase {phase}: run.deterministic fails: {counted(len(operators), 'operator')} without a deterministic kernel on {device} ({some(operators)}): "
        "a repeated or resumed run may differ in the last digits; use a network without them, or --run.device cpu"
    ]


def kernel_facts(deterministic: bool, device: torch.device) -> dict[str, str]:
    """What the bits of a step depend on, beside the config, the number of ranks and that of threads: for the checkpoint."""
    facts = {"run.deterministic": str(deterministic).lower(), "torch": torch.__version__}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts |= {name: os.environ.get(name, "unset") for name in _FIXED}
    return facts


def changed_facts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line about the facts that differ from those of the last start. An older dtl wrote none."""
    changes = [f"{name} was {value} and is now {now[name]}" for name, value in before.items() if now.get(name, value) != value]
    return [f"{', '.join(changes)}: the rounding of sums may differ"] if changes else []


# ---- the order of sums over ranks


def fix_buckets(wrapped: nn.Module) -> None:
    """Give DDP at once the buckets of gradients that it would make after its first step. All ranks together, before that step.

    An all-reduce over three and more ranks adds in an order that depends on where a gradient stands in its bucket. DDP's first step has one bucket
    with all gradients, so the first step after a resume rounded otherwise than the same step of a run that was not interrupted. Two ranks add
    in one order only.
    """
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel) or torch.distributed.get_world_size() < 3:
        return
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    wrapped.reducer.prepare_for_backward([])
    # Zeros for all, the last registered first, as in most networks' backward passes: which order it is does not matter, but it is the same in each start.
    torch.autograd.backward([(parameter * 0).sum() for parameter in parameters])
    wrapped.reducer._rebuild_buckets()
    for parameter in parameters:
        parameter.grad = None
