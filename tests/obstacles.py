"""Networks by the name of `obstacles:FUNCTION` that bring trouble with them, of a kind that the environment names."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import networks
from torch import nn


def small(num_classes: int) -> nn.Module:
    """`networks:small`; on the rank in $SLEEP_ON, reading sleeps while there is a file named `sleep`; the disk takes $SLOW_DISK s a file,
    or is full while there is a file of the name $FULL_DISK."""
    if os.environ.get("SLEEP_ON") == os.environ.get("RANK", "0"):
        _sleep_when_told()
    if "SLOW_DISK" in os.environ:
        _slow_disk(float(os.environ["SLOW_DISK"]))
    if "FULL_DISK" in os.environ:
        _full_disk(Path(os.environ["FULL_DISK"]))
    return networks.small(num_classes)


def unrepeatable(num_classes: int) -> nn.Module:
    """Its initial values are others in each process, and nothing restores what hangs on them but is no parameter."""
    network = networks.small(num_classes)
    scale = 1.0 + int.from_bytes(os.urandom(2), "little") / 65536
    network[0].register_forward_hook(lambda module, inputs, output: output * scale)
    return network


def full_history(num_classes: int) -> nn.Module:
    """`networks:small`, on a disk that takes no line of the history."""
    from dtl.runs.history import History

    def full(history: History) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(history.path))

    History._write = full
    return networks.small(num_classes)


def signalled(num_classes: int) -> nn.Module:
    """`networks:small`, on a process that gets a SIGTERM while it builds it."""
    os.kill(os.getpid(), signal.SIGTERM)
    return networks.small(num_classes)


def uncodec(num_classes: int) -> nn.Module:
    """`networks:small`; rank 1's machine has no torchcodec."""
    if os.environ.get("RANK") == "1":
        sys.modules["torchcodec.decoders"] = None  # type: ignore[assignment]
    return networks.small(num_classes)


def _sleep_when_told() -> None:
    from dtl.data.loading.loader import BatchDataset

    read = BatchDataset.__getitems__

    def slow(self: BatchDataset, request):  # type: ignore[no-untyped-def]
        while Path("sleep").exists():
            time.sleep(0.1)
        return read(self, request)

    BatchDataset.__getitems__ = slow  # type: ignore[method-assign]


def _slow_disk(seconds: float) -> None:
    from dtl.checkpoint.resume import tensors_file

    write = tensors_file._write

    def slow(path, pieces):  # type: ignore[no-untyped-def]
        time.sleep(seconds)
        return write(path, pieces)

    tensors_file._write = slow


def _full_disk(while_there: Path) -> None:
    from dtl.checkpoint.resume import tensors_file

    write = tensors_file._write

    def full(path, pieces):  # type: ignore[no-untyped-def]
        if while_there.exists():
            path.write_bytes(b"what still fitted")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, pieces)

    tensors_file._write = full


def other_torch() -> None:
    """This process has another version of torch."""
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "9.9.0" if name == "torch" else real(name)
    from dtl.distributed import same_start

    same_start.version = importlib.metadata.version


def far_ahead() -> None:
    """The host runs ahead of its device, which then takes half a second to come to a log line."""
    from dtl.training.step import Window

    real = Window.sum

    def late(self: Window) -> float:
        time.sleep(0.5 if self._added else 0.0)
        return real(self)

    Window.sum = late  # type: ignore[method-assign]


def reads_late() -> None:
    """Log lines get their losses one line late, as on a GPU."""
    from dtl.training.step import Window
    from dtl.training.throughput import StepLog

    Window.start_reading = lambda self: None  # type: ignore[method-assign]
    StepLog.reads_late = property(lambda self: True)  # type: ignore[assignment, method-assign]


def other_precision() -> None:
    """This process was launched with another precision."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def with_bf16() -> None:
    """This machine computes in bf16."""
    _bf16(True)


def without_bf16() -> None:
    """This machine does not compute in bf16."""
    _bf16(False)


def _bf16(has: bool) -> None:
    """On CPUs and on GPUs."""
    import torch

    from dtl.distributed import runtime

    runtime._cpu_has_bf16 = lambda: has
    torch.cuda.is_bf16_supported = lambda **_: has  # type: ignore[assignment]


def other_augmentations() -> None:
    """This dtl augments otherwise than the one before."""
    from dtl.data.transforms.transforms import VERSIONS

    VERSIONS["training"] += 1


def other_order() -> None:
    """This dtl draws the order of samples otherwise than the one before."""
    from dtl.checkpoint.resume import resume

    resume.PLAN_VERSION += 1


def slow_reads() -> None:
    """Every batch takes a while to read."""
    from dtl.data.loading.loader import BatchDataset

    read = BatchDataset.__getitems__

    def slow(self: BatchDataset, request):  # type: ignore[no-untyped-def]
        time.sleep(0.3)
        return read(self, request)

    BatchDataset.__getitems__ = slow  # type: ignore[method-assign]


def failing_step() -> None:
    """This process has a fault of its own at step 3."""
    from dtl.training.step import Stepper

    step = Stepper.step

    def failing(self, batches, **more):  # type: ignore[no-untyped-def]
        if more["step"] == 3:
            raise ZeroDivisionError("of one rank alone")
        return step(self, batches, **more)

    Stepper.step = failing  # type: ignore[method-assign]


def waiting_device() -> None:
    """While there is a file named `device`, the host waits in step $HOLD_FROM (in its first) for its device without an end, as behind an all-reduce of a
    peer that is gone: no error reaches it. The rank in $RAISE_ON raises one instead, when the others wait."""
    from dtl.training.step import Stepper

    step, number = Stepper.step, itertools.count(1)

    def held(self, batches, **more):  # type: ignore[no-untyped-def]
        waits = next(number) >= int(os.environ.get("HOLD_FROM", "1"))
        while waits and Path("device").exists():
            if os.environ.get("RAISE_ON") == os.environ["RANK"]:
                time.sleep(1.0)
                raise ZeroDivisionError("of one rank alone")
            time.sleep(0.1)
        return step(self, batches, **more)

    Stepper.step = held  # type: ignore[method-assign]


def begun_by_another() -> None:
    """Whenever this process lists a folder of runs (NAME-search, NAME-folds), another has just put the files of the folder `meanwhile` into it."""
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        for file in list(os.scandir("meanwhile")) if path.name.endswith(("-search", "-folds")) else ():
            shutil.copy(file.path, path)
        return listed(path)

    Path.iterdir = iterdir  # type: ignore[method-assign]


def no_proc() -> None:
    """This machine has no /proc, as some containers and sandboxes have none."""
    readlink, read_text, read_bytes = os.readlink, Path.read_text, Path.read_bytes

    def refusing(real):  # type: ignore[no-untyped-def]
        def read(path, *more, **options):  # type: ignore[no-untyped-def]
            if str(path).startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return real(path, *more, **options)

        return read

    os.readlink, Path.read_text, Path.read_bytes = refusing(readlink), refusing(read_text), refusing(read_bytes)  # type: ignore[method-assign]


def other_host() -> None:
    """This process computes on cores of its own, those of another host."""
    from dtl.training import dataloaders

    dataloaders.gethostname = lambda: "elsewhere"
