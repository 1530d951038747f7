"""The one place that knows ranks, devices, signals and how ranks come to agree.

Accelerate gives launch, device, process group and mixed precision. It does not get the loader, the schedule, the metrics or the
checkpoint (design section 4 says why). A launched world that is not the world seen is an error, never N silent single runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dtl.distributed.devices import uses_gpu
from dtl.distributed.launch import Launch, Place, check_own_gpus, check_supported, read_launch
from dtl.distributed.rendezvous import Arrivals, check_variables, rendezvous_store
from dtl.distributed.signals import Signals, StageInterrupted, StoppedBeforeFirstStep, StopWatcher
from dtl.errors import Occupied, UserError
from dtl.machine import Process, keep_freed_memory
from dtl.text import counted

T = TypeVar("T")
ranks_met = False
"""Whether this process has been among its peers: from then on all of them know of a user's mistake, and the main process prints it."""
# The watchdog ends a run that makes no progress, and reports why; the collectives' own limit is the net below it.
MARGIN = timedelta(seconds=30)
_NO_LIMIT = timedelta(days=30)


@dataclass(frozen=True)
class Flags:
    """What any rank may report in a step; after the all-reduce, what at least one of them reported."""

    stop: bool = False
    """A signal asked this rank to save and leave."""
    failed: bool = False
    """This rank's data of the step is damaged."""
    save: bool = False
    """A checkpoint is due by the clock (the main process decides)."""

    def to_list(self) -> list[int]:
        return [int(self.stop), int(self.failed), int(self.save)]


class Exchange:
    """An all-reduce of flags under way; `result()` waits for the slowest rank."""

    def __init__(self, flags: Flags, group: dist.ProcessGroup | None) -> None:
        self._flags = flags
        self._work = None
        if group is not None:
            self._values = torch.tensor(flags.to_list(), dtype=torch.int32)
            self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> Flags:
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._flags = Flags(*(bool(value) for value in self._values.tolist()))
        return self._flags


class Runtime:
    """This process among its peers. `close()` (or the context manager) leaves the process group."""

    def __init__(
        self,
        *,
        device: str = "auto",
        precision: str = "auto",
        trained_in: str | None = None,
        timeout_minutes: float = 30.0,
        compression: str = "no",
        alone: bool = False,
    ) -> None:
        """`trained_in`: the precision of the model's run, taken for `auto` where it can be.
        `compression`: what gradients are sent as between ranks, "no" (as they are), "bf16" or "fp16".
        `alone`: see `Runtime.alone`."""
        timeout = timedelta(minutes=timeout_minutes) + MARGIN
        if not alone:
            check_variables(os.environ)
            check_supported(os.environ)
        launch = read_launch()
        if alone:
            launch = replace(launch, world_size=None, local_world_size=1, asked_for=None, precision=None)
        self.launch = launch
        use_cpu = not uses_gpu(device, launch)
        if use_cpu:
            keep_freed_memory()
        else:
            use_fast_kernels(True)
        self.accelerator: Any = None
        self.device = torch.device("cpu" if use_cpu else "cuda")
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        self.precision = resolve_precision(precision, launch, use_cpu, trained_in)
        if not alone:
            with Arrivals(timeout_minutes), _local_rank_of_gpu(launch, use_cpu):
                self.accelerator = _accelerator(use_cpu, self.precision, compression, timeout)
            self.device = self.accelerator.device
            self.rank, self.world_size = int(self.accelerator.process_index), int(self.accelerator.num_processes)
            self.local_rank = launch.local_rank if self.device.type == "cuda" and self.world_size > 1 else int(self.accelerator.local_process_index)
            self.precision = str(self.accelerator.mixed_precision)
            _check_world(launch, self.world_size)
        if self.device.type == "cuda" and self.device.index is None:  # of one process: functions of torch.cuda ask for a number
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Decisions are all-reduced over gloo, also beside NCCL: they must not make the host wait for the GPU.
        self.group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
        global ranks_met
        ranks_met = ranks_met or not alone
        self.token: str = self.agree(secrets.token_hex(4))
        """Names this start of the ranks together, for keys in the rendezvous store."""
        self._num_onces = 0
        self.places = self.gather(Place(socket.gethostname(), self.local_rank, Process.this(), _names_of_gpu(self.device)))
        """Of all ranks, by rank."""
        try:
            check_own_gpus(self.places)
        except UserError:
            self.close()  # all ranks know it; at the process's end the group's threads would abort it
            raise
        leaders = [leader_of(rank, [(place.host, place.local_rank) for place in self.places]) for rank in range(self.world_size)]
        self._leader = leaders[self.rank]
        """The rank that acts for this node."""
        self.nodes = {leader: [rank for rank, other in enumerate(leaders) if other == leader] for leader in sorted(set(leaders))}
        """The ranks of each node, by the one that acts for it."""
        self._num_leaders = len(self.nodes)
        self._between_nodes: dist.ProcessGroup | None = None
        if not alone and not os.environ.get("LOCAL_WORLD_SIZE"):
            self.launch = replace(launch, local_world_size=leaders.count(self._leader))
        self.signals = Signals(prints=self.is_main and not alone)
        self._stack = contextlib.ExitStack()

    @classmethod
    def alone(cls, device: str = "auto") -> Runtime:
        """One process by itself, also inside a launched one: it joins no process group and waits for nobody. It computes in float32."""
        return cls(device=device, precision="no", alone=True)

    @classmethod
    def planned(cls, precision: str) -> Runtime:
        """This process in place of all that the launch has started, or will start elsewhere: for a dry run on a machine that may have no GPU.

        It stands for rank 0 and knows how many there are. What only their devices decide is open: `precision` may be auto."""
        launch, runtime = read_launch(), cls.alone("cpu")
        runtime.world_size = launch.world_size or 1
        runtime.precision = launch.precision or "auto" if precision == "auto" else precision
        return runtime

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The forward pass inside computes in the runtime's precision."""
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """This rank acts for its node."""
        return self.rank == self._leader

    def __enter__(self) -> Runtime:
        self.signals.catch()
        if not self.is_main:  # what torch warns of, it warns of on all ranks
            self._stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"torch(\.|$)")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        self.signals.release()
        # After a fault the peers may be stuck or gone: destroying the group would wait for them.
        if kind is None or issubclass(kind, (UserError, SystemExit)):
            self.close()

    def close(self) -> None:
        if self.accelerator is None:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        self.group = self._between_nodes = None
        _forget_accelerate()

    # ---- signals

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked this rank to stop, if one did."""
        return self.signals.received

    @contextlib.contextmanager
    def before_first_step(self, due: Callable[[], str | None]) -> Iterator[None]:
        """Stages with nothing to save: a signal to any rank, or the main process's `due()`, interrupts what the ranks do in `together`,
        which then raises StoppedBeforeFirstStep on all of them."""
        store = None if self.group is None else rendezvous_store()
        key = f"dtl/stop/{self.token}"
        with StopWatcher(
            self.signals,
            announce=lambda: store is None or store.add(key, 1),
            announced=lambda: store is not None and store.add(key, 0) > 0,
            due=due if self.is_main else lambda: None,
        ):
            yield
            with self.together("start"):
                pass  # what came after the last stage

    def leave_limits_to_watchdog(self) -> None:
        """From here on the watchdog ends a run in which nothing moves. It knows the time in which the whole job was suspended; collectives do not."""
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # the latter before torch 2.12
        for group in () if self.group is None else (dist.group.WORLD, self.group):
            set_timeout(_NO_LIMIT, group)

    # ---- agreement

    def exchange(self, flags: Flags) -> Exchange:
        """Start an all-reduce of `flags`, without waiting; every rank must call it the same number of times."""
        return Exchange(flags, self.group)

    def agree(self, value: T) -> T:
        """The main process's `value` on all ranks. All decisions that ranks must share go through here or `exchange`."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank. Small things only."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's CPU tensor of one shape, in rank order, on every rank."""
        if self.group is None:
            return [rows]
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows, group=self.group)
        return gathered

    def join_nodes(self) -> None:
        """Before `from_node`; all ranks together."""
        if self._between_nodes is None and len(self.nodes) > 1:
            self._between_nodes = dist.new_group(list(self.nodes), backend="gloo", timeout=_NO_LIMIT)  # type: ignore[assignment]

    def from_node(self, leader: int, rows: torch.Tensor) -> None:
        """Fill the CPU tensor `rows` with that of `leader`; called by the leaders of all nodes together."""
        dist.broadcast(rows, src=leader, group=self._between_nodes)

    def same(self, what: str, value: T) -> T:
        """`value`, after making sure that it is equal on all ranks; a UserError that names the ranks otherwise."""
        values = self.gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise UserError(f"ranks disagree on {what}: rank 0 has {values[0]!r}, rank {others[0]} has {values[others[0]]!r}")
        return value

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A stage that any rank may fail at: when one does, all raise its one line, instead of waiting for it for ever.

        `what` the stage is about, in front of the system's own errors, which do not name it.
        """
        error: BaseException | None = None
        try:
            with self.signals.breakable():
                yield
        except (UserError, OSError, StageInterrupted) as caught:
            error = caught
        except Exception as caught:
            if self.signals.stop_before_first_step is None:
                raise
            error = caught  # of work that was interrupted
        answers = self.gather((_describe(error, what), self.signals.stop_before_first_step))
        if stops := [why for _, why in answers if why is not None]:
            raise StoppedBeforeFirstStep(stops[0])
        problems = {rank: problem for rank, (problem, _) in enumerate(answers) if problem is not None}
        if problems:
            rank, problem = next(iter(problems.items()))
            alone = f"rank {rank}: " if rank and len(problems) < self.world_size else ""
            raise UserError(f"{alone}{problem}") from (error if isinstance(error, OSError | Occupied) else None)

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a small CPU tensor, on all ranks."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def sum_floats(self, *values: float) -> list[float]:
        """Each value's sum over ranks, on all ranks."""
        if self.group is None:
            return [float(value) for value in values]
        summed: list[float] = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return summed

    def once_a_node(self, work: Callable[[], list[str]]) -> list[str]:
        """What `work` gives on the main process of each node, on all processes of the node; they fail as it does. Inside `together`."""
        if self.group is None:
            return work()
        # Not a broadcast, whose time limit is the collectives': packing may take hours.
        self._num_onces += 1
        key, store = f"dtl/once/{self.token}/{self._num_onces}", rendezvous_store()
        error: UserError | OSError | None = None
        if self.leads_node:
            answer: list[Any] = ["interrupted", None]
            try:
                answer = ["done", work()]
            except (UserError, OSError) as caught:
                error, answer = caught, ["wrong" if isinstance(caught, UserError) else "failed", str(caught)]
            finally:
                store.set(f"{key}/{self.rank}", json.dumps(answer))
                store.add(key, 1)
        _wait_until(lambda: store.add(key, 0) >= self._num_leaders)
        if error is not None:
            raise error
        kind, value = json.loads(store.get(f"{key}/{self._leader}"))
        if kind == "interrupted":
            raise StageInterrupted
        if kind != "done":
            raise (UserError if kind == "wrong" else OSError)(value)
        found: list[str] = value
        return found

    def main_first(self, work: Callable[[], T]) -> T:
        """`work` on the main process of each node first (it may fill a cache), then on the others. Inside `together`."""
        results: list[T] = []

        def first() -> list[str]:
            results.append(work())
            return []

        self.once_a_node(first)
        return results[0] if results else work()

    def sync_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Give all ranks the main process's values, in one message per dtype."""
        if self.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.broadcast(flat, src=0)
            for tensor, value in zip(group, torch.split(flat, [tensor.numel() for tensor in group])):
                tensor.detach().copy_(value.view_as(tensor))


def resolve_precision(wanted: str, launch: Launch, use_cpu: bool, trained_in: str | None = None) -> str:
    """`auto`: the launch file's value, else `trained_in` where the hardware computes in it, else bf16 likewise. A conflict with the launch
    file is refused."""
    if wanted != "auto":
        if launch.precision not in (None, wanted):
            raise UserError(
                f"precision is {wanted}, but mixed_precision of the launch is {launch.precision}; give both the same value, or use --precision auto"
            )
        if wanted == "fp16" and use_cpu:
            raise UserError("precision fp16 needs a GPU; use bf16 or no on a CPU")
        return wanted
    if launch.precision is not None:
        return launch.precision
    has_bf16 = _cpu_has_bf16() if use_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    if trained_in == "no" or (trained_in == "fp16" and not use_cpu):
        return trained_in
    return "bf16" if has_bf16 else "no"


def fp16_instead(wanted: str, runtime: Runtime) -> list[str]:
    """A line where `auto` has come to float32 on a GPU whose tensor cores know fp16 only (V100, T4, RTX 20)."""
    if wanted != "auto" or runtime.precision != "no" or runtime.launch.precision is not None or runtime.device.type != "cuda":
        return []
    properties = torch.cuda.get_device_properties(runtime.device)
    if torch.version.hip or properties.major != 7:
        return []
    return [f"{properties.name} has no bf16, so precision auto computes in float32: --precision fp16 is usually several times faster on it"]


def _cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 are native here; emulated ones are slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def leader_of(rank: int, nodes: Sequence[tuple[str, int]]) -> int:
    """The rank that acts for the node of `rank`; `nodes` has each rank's host and its number on the node. Two launches on one host are two nodes."""
    host = nodes[rank][0]
    leaders = [other for other, (place, local_rank) in enumerate(nodes) if place == host and local_rank == 0]
    before = [leader for leader in leaders if leader <= rank]
    return before[-1] if before else leaders[0] if leaders else rank


def _wait_until(condition: Callable[[], bool]) -> None:
    pause = 0.01
    while not condition():
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _accelerator(use_cpu: bool, precision: str, compression: str, timeout: timedelta) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs

    _forget_accelerate()
    handlers = [
        InitProcessGroupKwargs(timeout=timeout),
        # No static graph: benchmarks.scaling shows no gain, and it would forbid networks that skip layers at random.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=DDPCommunicationHookType(compression)),
    ]
    return Accelerator(cpu=use_cpu, mixed_precision=precision, gradient_accumulation_steps=1, kwargs_handlers=handlers)


@contextlib.contextmanager
def _local_rank_of_gpu(launch: Launch, use_cpu: bool) -> Iterator[None]:
    """Accelerate takes LOCAL_RANK for the number of the GPU, also where a rank sees one GPU only (srun --gpus-per-task=1, Kubernetes)."""
    if use_cpu or not os.environ.get("LOCAL_RANK"):
        yield
        return
    before, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], str(launch.local_rank % torch.cuda.device_count())
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def _names_of_gpu(device: torch.device) -> tuple[str, ...]:
    """By its UUID, and by its place on this host's bus, which two MIG slices of one GPU have in common."""
    if device.type != "cuda":
        return ()
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some of them
    bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"
    return f"GPU-{properties.uuid}", f"{socket.gethostname()} {bus}"


def _forget_accelerate() -> None:
    """Accelerate keeps the first run's device and precision for the whole process; each run (and each call of the API) chooses its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    GradientState._reset_state()


def use_fast_kernels(wanted: bool) -> None:
    """TF32 for the matrix products that are left in float32, and cuDNN's quickest kernels, found by trying them: batches have one size."""
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.benchmark = wanted and not torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.allow_tf32 = wanted  # convolutions have a switch of their own, which is on by default


def _check_world(launch: Launch, world_size: int) -> None:
    for number, source in ((launch.world_size, "WORLD_SIZE is"), (launch.asked_for, "the launcher was asked for")):
        if number is not None and number != world_size:
            raise UserError(
                f"{source} {counted(number, 'process')}, but WORLD_SIZE in this process is {world_size}: each would train a separate run. "
                "On CPUs use `accelerate launch --config_file launch/cpu_2.yaml --num_processes N`, or torchrun --nproc-per-node N"
            )


def _describe(error: BaseException | None, what: str) -> str | None:
    if error is None:
        return None
    line = " ".join(str(error).split())
    return line if isinstance(error, UserError) else f"{what}: {line}"
