"""torchvision, timm, torch.optim and DistributedDataParallel without PyTorch's compiler: its import takes 2 to 3 CPU seconds of each start, and only
`model.compile` needs it.

None of them has a switch for it, and `importlib.util.LazyLoader` cannot help: `from module import name` asks a lazy module for the name at once. So two
modules have a stand-in in `sys.modules`, for as long as an import or a constructor takes, and two private marks of PyTorch are set and taken back. A PyTorch
that has other names for these imports its compiler as ever, which is slow and right; with the compiler in memory nothing here does anything.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_COMPILER, _UTILS, _MARK = "torch._dynamo", "torch._dynamo.utils", "__dynamo_disable"


def without_compiler() -> AbstractContextManager[None]:
    """Within it an import of torchvision does not import the compiler: torchvision's roi_align asks it for one function, for a call that may never come.

    What is asked for gets a module that imports the real one when it is used.
    """
    return nullcontext() if _COMPILER in sys.modules else _stand_in(_Later(_UTILS))


@contextmanager
def _stand_in(later: _Later) -> Iterator[None]:
    """In `sys.modules` until the block ends or the real one is imported; not where that is in memory."""
    if later.__name__ in sys.modules:
        yield
        return
    sys.modules[later.__name__] = later
    try:
        yield
    finally:
        if sys.modules.get(later.__name__) is later:
            del sys.modules[later.__name__]


class _Later(ModuleType):
    """Stands in for a module that is imported at the first use of what is taken from it."""

    def is_compile_supported(self, device_type: str) -> bool:
        return bool(self._real().is_compile_supported(device_type))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks for its own
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


def ddp_without_compiler() -> AbstractContextManager[None]:
    """Within it DistributedDataParallel wraps a module without importing the compiler, only to ask whether that is to exchange the gradients: by default it
    is not."""
    return _stand_in(_LaterCompiler(_COMPILER))


class _LaterCompiler(_Later):
    """Answers the one question of DistributedDataParallel as a compiler does that nobody has set up; is imported at any other."""

    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # a module of the package is imported
            return self._real().__path__
        return super().__getattr__(name)


def plain_forward(wrapped: nn.Module) -> None:
    """Let a DistributedDataParallel run forward as it does, without what imports the compiler to tell it that one of its methods is not for it."""
    inner: Any = getattr(type(wrapped), "_inside_ddp_forward", None)
    if _COMPILER in sys.modules or inner is None:
        return
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    wrapped.__dict__["_inside_ddp_forward"] = MethodType(contextmanager(inner), wrapped)


@contextmanager
def optimizers_without_compiler() -> Iterator[None]:
    """Within it `torch.optim` builds optimizers without importing the compiler, only to tell it that their methods are not for it."""
    marked: list[Callable[..., Any]] = []
    if _COMPILER not in sys.modules:
        import torch

        for method in vars(torch.optim.Optimizer).values():
            inner: Any = getattr(method, "__wrapped__", None)
            if getattr(getattr(method, "__code__", None), "co_filename", "").endswith("_compile.py") and not hasattr(inner, _MARK):
                setattr(inner, _MARK, inner)
                marked.append(inner)
    try:
        yield
    finally:
        for inner in marked:
            delattr(inner, _MARK)


def plain_step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """`optimizer.step` as it is where the compiler is used; else the same without what it is wrapped in, which imports the compiler for its sake,
    opens a range for the profiler and asks for hooks: dtl has none."""
    if _COMPILER in sys.modules:
        return optimizer.step
    import torch

    inner: Callable[..., object] = type(optimizer).step
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    return MethodType(torch.no_grad()(inner), optimizer)
